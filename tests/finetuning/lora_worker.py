"""LoRA at every layout: losses against an independent loop, values, merging, adapter folders."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from distributed import train_worker as pretraining
from distributed import trainings
from distributed.harness import Checks, Run, main
from distributed.trainings import (
    RECOMPUTE,
    apart,
    gather_state,
    join,
    mean_loss,
    mock_batches,
    settle,
    tiny_folder,
)
from helpers import tiny_config
from qwen2_ascend.checkpoint.staging import partial_folder
from qwen2_ascend.errors import UserError
from qwen2_ascend.lora_config import LoraConfig

if TYPE_CHECKING:
    import torch

    from qwen2_ascend.training.loop import TrainingRun

TOLERANCE = 2e-7
"""Tolerance of a loss in nats per token."""
STEPS, LENGTH, GLOBAL_BATCH = 4, 24, 8
LR, CLIP = 2e-2, 0.02

CHECKS = Checks()

LAYOUTS = {
    "tp1": (1, ""),
    "tp1-recomputed": (1, RECOMPUTE),
    **{
        name: pretraining.LAYOUTS[name]
        for name in ("tp2", "tp2-sp", "pp2", "pp2-vpp2", "dp2-distributed-optimizer", "tp2-pp2")
    },
    # twice as many ranks as query groups: a rank's rows of linear_qkv are half a group
    "tp4-sp": (4, "--tensor-model-parallel-size 4 --sequence-parallel"),
}
ADAPTERS = {
    "all": LoraConfig(rank=4, alpha=8, targets=("all-linear",)),
    "some": LoraConfig(
        rank=3, alpha=7, targets=("q_proj", "v_proj", "up_proj", "linear_fc2"), use_rslora=True
    ),
}
MODELS = {
    "all": {"num_query_groups": 4, "tie_word_embeddings": True},
    "some": {"num_query_groups": 2, "tie_word_embeddings": False},
}
"""What each case's model has."""
FLAGS = (
    f"--mock-data --seq-length {LENGTH} --global-batch-size {GLOBAL_BATCH} --micro-batch-size 2 "
    f"--train-iters {STEPS} --lr {LR} --lr-decay-style constant --clip-grad {CLIP} --device cpu "
    f"--weight-decay {trainings.WEIGHT_DECAY}"
)


def model_config(case: str):
    return tiny_config(**MODELS[case])


def unless_refused(check: Callable[..., str]) -> Callable[..., str]:
    """The check; a query group that the installed release cannot cut has to be refused instead."""

    @functools.wraps(check)
    def checked(*case: Any) -> str:
        from qwen2_ascend.runtime.megatron_compat import megatron_release

        try:
            return check(*case)
        except UserError as error:
            assert megatron_release() < (0, 16)
            assert "is above num_query_groups=2" in str(error)
            assert "install megatron-core 0.16" in str(error)
            return f"refused: {error}"

    return checked


# --- losses --------------------------------------------------------------------------------------


@unless_refused
def losses_are_those_of_an_independent_loop(layout: str, case: str, run: Run) -> str:
    """Four steps, so that gradients and updates are compared too; a low rank needs both."""
    training = start(run, case, LAYOUTS[layout][1])
    results = train(training)
    losses, norms = [r.loss for r in results], [r.grad_norm for r in results]
    expected_losses, expected_norms, moved = reference(base_folder(run, case), case)
    worst = apart(losses, expected_losses)
    assert worst <= TOLERANCE, f"losses {losses}, expected {expected_losses}"
    off = max(abs(a / b - 1) for a, b in zip(norms, expected_norms, strict=True))
    assert off <= 1e-5, f"gradient norms {norms}, expected {expected_norms}"
    assert min(norms) > CLIP, "clipping was not tried"
    assert moved > 1e-3, "the adapters do not matter"
    return json.dumps({"losses": losses, "off": worst, "norms": off})


for _layout, (_world_size, _) in LAYOUTS.items():
    for _case in ADAPTERS:
        _name, _check = f"{_layout}-{_case}", losses_are_those_of_an_independent_loop
        CHECKS.case(_name, _world_size, _check, _layout, _case)


@functools.cache
def reference(folder: Path, case: str) -> tuple[list[float], list[float], float]:
    """Losses and gradient norms of a transformers model with adapters written out here.

    And by how much the adapters have moved the loss of the last batch.
    """
    batches, base = batches_of(case), []

    def change(model: Any) -> None:
        model.requires_grad_(False)
        adapted = adapt(model, ADAPTERS[case])
        assert sum(p.requires_grad for p in model.parameters()) == 2 * len(adapted)
        base.append(mean_loss(model, batches[-1]).item())  # every B is zero still

    losses, norms = trainings.reference(
        folder, batches, mean_loss, lr=lambda step: LR, clip=CLIP, change=change
    )
    return losses, norms, abs(losses[-1] - base[0])


def batches_of(case: str) -> list[list[Any]]:
    return mock_batches(STEPS, GLOBAL_BATCH, LENGTH, model_config(case).vocab_size)


def adapt(model: Any, lora: LoraConfig) -> list[torch.nn.Module]:
    """Puts an adapter on each target, with the values that ours begin with."""
    import torch

    class Adapted(torch.nn.Module):
        def __init__(self, name: str, base: torch.nn.Linear) -> None:
            super().__init__()
            self.base = base
            first = initial_a(f"base_model.model.{name}.lora_A.weight", lora, base.in_features)
            self.a = torch.nn.Parameter(first)
            self.b = torch.nn.Parameter(torch.zeros(base.out_features, lora.rank))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + (x @ self.a.T) @ self.b.T * lora.scaling

    adapted = []
    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if last in lora.targets:
            adapted.append(Adapted(name, module))
            setattr(model.get_submodule(parent), last, adapted[-1])
    return adapted


def initial_a(name: str, lora: LoraConfig, columns: int) -> torch.Tensor:
    """The documented start: uniform within 1 / sqrt(columns), seeded by the tensor's name."""
    import hashlib

    import torch

    digest = hashlib.sha256(f"1234 {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = columns**-0.5
    return torch.empty(lora.rank, columns).uniform_(-bound, bound, generator=generator)


# --- dropout -------------------------------------------------------------------------------------


@CHECKS.add(world_size=2)
def dropout_leaves_what_ranks_share_the_same(run: Run) -> str:
    """Masks of whole inputs are the same on all ranks, of cut ones they are not; and they drop."""
    import torch
    from megatron.core import parallel_state

    from qwen2_ascend.finetuning.lora import lora_state

    for layout in ("tp2", "tp2-sp"):
        training = start(run, "all", LAYOUTS[layout][1], dropout=0.5)
        plain = start(run, "all", LAYOUTS[layout][1])
        found, without = train(training), train(plain)
        assert found[0].loss == without[0].loss, "B is zero: nothing to drop yet"
        assert all(abs(a.loss - b.loss) > 1e-5 for a, b in zip(found[2:], without[2:], strict=True))
        group = parallel_state.get_tensor_model_parallel_group()
        compared = 0
        for name, parameter in lora_state(training.chunks)[0].items():
            if not getattr(parameter, "tensor_model_parallel", False):
                both = [torch.empty_like(parameter) for _ in range(2)]
                torch.distributed.all_gather(both, parameter.detach(), group=group)
                assert torch.equal(*both), f"{layout}: {name} went apart"
                compared += 1
        assert compared == 4 * 4, compared
    return ""


@CHECKS.add(world_size=2)
def cut_inputs_drop_differently_on_each_rank(run: Run) -> None:
    import torch
    from megatron.core import parallel_state

    for layout, module, alike in (
        ("tp2", "self_attention.linear_qkv", True),
        ("tp2", "mlp.linear_fc2", False),
    ):
        training = start(run, "all", LAYOUTS[layout][1], dropout=0.5)
        chunk = training.chunks[0].module
        adapter = chunk.get_submodule(f"decoder.layers.0.{module}").adapter.train()
        dropped = adapter._dropped(torch.ones(4, 2, 48)) == 0
        assert 0.3 < dropped.float().mean() < 0.7
        both = [torch.empty(dropped.shape) for _ in range(2)]
        group = parallel_state.get_tensor_model_parallel_group()
        torch.distributed.all_gather(both, dropped.float(), group=group)
        assert torch.equal(*both) == alike, (layout, module)
        adapter.eval()
        assert (adapter._dropped(torch.ones(4, 2, 48)) == 1).all()


# --- freezing ------------------------------------------------------------------------------------


@CHECKS.add(world_size=2)
def only_adapters_are_trained(run: Run) -> str:
    import torch

    from qwen2_ascend.finetuning.lora import lora_state

    for layout in ("tp2-sp", "pp2"):
        training = start(run, "some", LAYOUTS[layout][1])
        chunks = [chunk.module for chunk in training.chunks]
        before = {key: value.clone() for key, value in chunks[0].named_parameters()}
        adapters = lora_state(training.chunks)[0]
        base = evaluate(training)
        train(training)
        assert abs(base - evaluate(training)) > 1e-3
        for key, value in chunks[0].named_parameters():
            changed = not torch.equal(value, before[key])
            assert changed == (key in adapters) == value.requires_grad, key
        kept = {name for _, name, _ in gather_state(training.optimizer, chunks)}
        assert kept == adapters.keys()
    return ""


@CHECKS.add(world_size=2)
def half_precision_trains(run: Run) -> str:
    found = [
        [r.loss for r in train(start(run, "all", f"{LAYOUTS['tp2-sp'][1]} {flags}"))]
        for flags in ("", "--bf16")
    ]
    worst = apart(*found)
    assert worst < 2e-2, found
    return f"differs by {worst:.1e}"


@CHECKS.add(world_size=2)
def the_chunked_cross_entropy_changes_nothing(run: Run) -> str:
    found = [
        [r.loss for r in train(start(run, "all", f"{LAYOUTS['tp2-sp'][1]} {flags}"))]
        for flags in ("", "--cross-entropy-chunk-size 5")
    ]
    worst = apart(*found)
    assert worst <= TOLERANCE, found
    return f"differs by {worst:.1e}"


# --- adapter folders -----------------------------------------------------------------------------


@unless_refused
def adapters_go_to_peft_and_back(before: str, after: str, case: str, run: Run) -> str:
    """Bit for bit through another layout; and what is saved there is the same file."""
    from qwen2_ascend.checkpoint.formats.peft_adapter import read_lora_config
    from qwen2_ascend.finetuning.adapter import load_adapter

    lora, config = ADAPTERS[case], model_config(case)
    training = start(run, case, LAYOUTS[before][1])
    train(training)
    settle(training)
    trained = evaluate(training)
    first, second = (run.folder / f"{before}-{after}-{case}-{i}" for i in (1, 2))
    save_adapter(training, case, first)
    with pytest.raises(UserError, match="something else was written there meanwhile"):
        save_adapter(training, case, first)
    if run.runtime.rank == 0:
        shutil.rmtree(partial_folder(first))
    run.runtime.barrier()
    assert read_lora_config(first) == lora
    assert sorted(path.name for path in first.parent.glob(f"*{first.name}*")) == [first.name]

    other = start(run, case, LAYOUTS[after][1])
    load_adapter(other.chunks, lora, config, other.settings.layout(), first)
    assert abs(evaluate(other) - trained) <= TOLERANCE
    save_adapter(other, case, second)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name

    return ""


for _before, _after in itertools.chain(
    itertools.permutations(("tp2-sp", "pp2-vpp2", "dp2-distributed-optimizer"), 2),
    (("tp2-pp2", "tp4-sp"), ("tp4-sp", "tp2-pp2")),
):
    for _case in ADAPTERS:
        _name, _check = f"folder-{_before}-{_after}-{_case}", adapters_go_to_peft_and_back
        CHECKS.case(_name, LAYOUTS[_before][0], _check, _before, _after, _case)


@CHECKS.add(world_size=1)
def an_adapter_of_another_kind_is_refused(run: Run) -> str:
    from qwen2_ascend.finetuning.adapter import load_adapter

    training = start(run, "all", "")
    config, cut = model_config("all"), training.settings.layout()
    folder = run.folder / "another-kind"
    save_adapter(training, "all", folder)
    other = LoraConfig(rank=8, alpha=8, targets=("q_proj",))
    with pytest.raises(UserError, match="has rank 4, the one asked for 8") as caught:
        load_adapter(training.chunks, other, config, cut, folder)
    assert len(caught.value.faults) == 2
    return ""


# --- building ------------------------------------------------------------------------------------


def base_folder(run: Run, case: str) -> Path:
    return tiny_folder(run, f"base-{case}", **MODELS[case])


def start(run: Run, case: str, flags: str, dropout: float = 0.0) -> TrainingRun:
    """A run at iteration 0 that trains the case's adapters."""
    import dataclasses

    from qwen2_ascend.finetuning.lora import apply_lora
    from qwen2_ascend.training.mock_data import MockDataset
    from qwen2_ascend.training.plan import make_plan
    from qwen2_ascend.training.settings import parse, validate
    from qwen2_ascend.training.setup import build_chunks, build_run

    plan = make_plan(parse(f"{FLAGS} {flags} --load {base_folder(run, case)}".split()))
    join(run, plan, validate)
    chunks = build_chunks(plan, run.runtime)
    lora = dataclasses.replace(ADAPTERS[case], dropout=dropout)
    apply_lora(chunks, lora, plan.config, plan.layout)
    data = MockDataset(STEPS * GLOBAL_BATCH, LENGTH, plan.config.vocab_size, seed=1234)
    return build_run(plan.settings, run.runtime, chunks, train_data=data, valid_data=data)


def train(training: TrainingRun) -> list[Any]:
    return pretraining.steps(training, STEPS)


def save_adapter(training: TrainingRun, case: str, folder: Path) -> None:
    """Exports the adapters as --save-adapter does."""
    from qwen2_ascend.finetuning.lora_checkpoint import MegatronLora
    from qwen2_ascend.training.checkpointing import CheckpointIdentity

    config = model_config(case)
    identity = CheckpointIdentity(
        config=config,
        layout=training.settings.layout(),
        padded_vocab_size=config.vocab_size,
        dtype=training.settings.precision_name(),
        side_files={},
    )
    MegatronLora(training, identity, ADAPTERS[case], Path("base")).export(folder, {})


def evaluate(training: TrainingRun) -> float:
    """Loss per token of a few samples."""
    import dataclasses

    settings = training.settings
    data = dataclasses.replace(settings.data, eval_iters=1)
    training.settings = dataclasses.replace(settings, data=data)
    return training.evaluate()


if __name__ == "__main__":
    main(CHECKS)
