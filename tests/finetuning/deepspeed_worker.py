"""DeepSpeed ZeRO at one and two ranks: losses against transformers alone, resuming, weights out.

The reference is that of finetune_worker.py: every chat alone, without packing or padding, and
torch's AdamW.
"""

from __future__ import annotations

import functools
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from distributed.harness import Checks, Run, main
from distributed.trainings import RECOMPUTE, apart, join, save_once
from finetuning.finetune_worker import FLAGS, chats, hugging_face_folder, reference, sft_loss, taken
from finetuning.finetune_worker import trained as steps_of
from qwen2_ascend.errors import UserError

if TYPE_CHECKING:
    from qwen2_ascend.finetuning.deepspeed.engine import ZeroRun

LOSS_TOLERANCE, NORM_TOLERANCE = 2e-6, 1e-5
CHECKS = Checks()

OFFLOAD = "--offload-optimizer --cpu-adam torch"
LORA = "--lora-r 3 --lora-alpha 7 --lora-target-modules q_proj v_proj up_proj linear_fc2"
DROPPED = f"{LORA} --lora-dropout 0.2"
CASES = {
    "stage1-one-by-one": (1, "--zero-stage 1 --micro-batch-size 1"),
    "stage2-packed-rows": (1, "--zero-stage 2 --micro-batch-size 4 --pack"),
    "stage3-variable": (1, "--zero-stage 3 --micro-batch-size 2 --variable-seq-lengths"),
    "stage2-recompute": (1, f"--zero-stage 2 --micro-batch-size 2 --pack {RECOMPUTE}"),
    "stage1-packed": (2, "--zero-stage 1 --micro-batch-size 1 --pack"),
    "stage2-packed-rows-unfused": (
        2,
        "--zero-stage 2 --micro-batch-size 4 --pack --attention-backend unfused",
    ),
    "stage2-one-by-one-offload": (2, f"--zero-stage 2 --micro-batch-size 1 {OFFLOAD}"),
    "stage3-packed": (2, "--zero-stage 3 --micro-batch-size 1 --pack"),
    "stage3-variable-recompute": (
        2,
        f"--zero-stage 3 --micro-batch-size 2 --variable-seq-lengths {RECOMPUTE}",
    ),
    "stage3-packed-offload": (
        2,
        f"--zero-stage 3 --micro-batch-size 2 --pack --offload-param {OFFLOAD}",
    ),
}
LORA_CASES = {
    "stage1-packed": (1, "--zero-stage 1 --micro-batch-size 2 --pack"),
    "stage3-recompute": (1, f"--zero-stage 3 --micro-batch-size 2 {RECOMPUTE}"),
    "stage1-offload": (2, f"--zero-stage 1 --micro-batch-size 2 {OFFLOAD}"),
    "stage2-recompute": (2, f"--zero-stage 2 --micro-batch-size 2 --pack {RECOMPUTE}"),
    # small weights are not divided otherwise
    "stage3-divided": (2, "--zero-stage 3 --micro-batch-size 2 --pack {divided}"),
    "stage3-divided-recompute": (
        2,
        f"--zero-stage 3 --micro-batch-size 2 --variable-seq-lengths {RECOMPUTE} {{divided}}",
    ),
}
CASES |= {f"lora-{name}": (size, f"{flags} {LORA}") for name, (size, flags) in LORA_CASES.items()}


def losses_are_those_of_transformers(flags: str, run: Run) -> str:
    """Over four updates, though ranks and micro-batches have different numbers of tokens.

    Adapters are written out in lora_worker.py on transformers' model.
    """
    training, _ = start(run, flags_of(run, flags))
    batches = taken(training)
    losses, norms = steps_of(training)
    change = adapted if LORA in flags else None
    expected, expected_norms = reference(hugging_face_folder(run), batches, sft_loss, change)
    worst = close(losses, expected)
    norm = max(abs(a - b) / b for a, b in zip(norms, expected_norms, strict=True))
    assert norm <= NORM_TOLERANCE, f"gradient norms {norms}, expected {expected_norms}"
    assert max(losses) - min(losses) > 1e-3
    return f"losses within {worst}, gradient norms {norm:.1e}"


for _name, (_world_size, _flags) in CASES.items():
    CHECKS.case(_name, _world_size, losses_are_those_of_transformers, _flags)


@CHECKS.add(world_size=2)
def losses_are_those_of_the_megatron_path(run: Run) -> str:
    from finetuning.finetune_worker import start as start_megatron

    flags = f"{FLAGS} --micro-batch-size 2 --pack --data-path {chats(run)}"
    expected, _ = steps_of(start_megatron(run, f"{flags} --tensor-model-parallel-size 2").run)
    losses, _ = steps_of(start(run, f"{flags} --zero-stage 2")[0])
    return close(losses, expected)


@CHECKS.add(world_size=2)
def the_validation_loss_is_that_of_its_samples(run: Run) -> str:
    """Measured on what the first step trains on, before it, it is that step's loss."""
    data = f"--train-data-path {chats(run)} --valid-data-path {chats(run)} --eval-iters 1"
    differences = []
    for adapters in ("", LORA):
        training = start(run, f"{FLAGS} --zero-stage 3 --micro-batch-size 2 {data} {adapters}")[0]
        measured = training.evaluate()
        differences.append(abs(steps_of(training, 1)[0][0] - measured))
    assert max(differences) <= 1e-6, differences
    return f"{max(differences):.1e}"


# --- checkpoints ---------------------------------------------------------------------------------


def a_resumed_run_goes_on(flags: str, run: Run) -> str:
    """Two steps, then two from their checkpoint, are the four of an undisturbed run, bit by bit."""
    folder = run.folder / f"resumed{flags.replace(' ', '')}"
    flags = flags_of(run, f"--micro-batch-size 2 --pack {flags}")
    expected, _ = steps_of(start(run, flags)[0])
    losses, saved = steps_and_save(run, f"{flags} --save {folder}")
    again, _ = start(run, f"{flags} --save {folder}", load=folder)
    assert again.progress.iteration == 2 and again.progress.consumed_samples == 16
    losses += steps_of(again, 2)[0]
    assert losses == expected, (losses, expected)
    assert max(expected) - min(expected) > 1e-4
    return f"{saved.name}, losses {losses}"


for _name, (_world_size, _flags) in {
    "stage2": (1, "--zero-stage 2"),
    "stage1": (2, "--zero-stage 1"),
    "stage2-bf16": (2, "--zero-stage 2 --bf16"),
    "stage3-bf16": (2, "--zero-stage 3 --bf16"),
    "lora-stage2": (1, f"--zero-stage 2 {DROPPED}"),
    "lora-stage2-bf16": (2, f"--zero-stage 2 --bf16 {DROPPED}"),
    "lora-stage3-bf16": (2, f"--zero-stage 3 --bf16 {{divided}} {DROPPED}"),
}.items():
    CHECKS.case(f"resume-{_name}", _world_size, a_resumed_run_goes_on, _flags)


@CHECKS.add(world_size=1)
def a_resumed_run_follows_its_command_line(run: Run) -> str:
    """At each stage what is said anew of clipping and of Adam is what the next steps do."""
    anew = "--adam-beta1 0.5 --adam-beta2 0.95 --adam-eps 1e-3 --clip-grad"
    for stage in (1, 2, 3):
        folder, flags = run.folder / f"anew{stage}", f"--zero-stage {stage} --micro-batch-size 8"
        flags = f"{flags_of(run, flags)} --save {folder}"
        steps_and_save(run, flags)
        kept, halved, loose = (
            steps_of(start(run, f"{flags} {more}", load=folder)[0], 2)[0]
            for more in ("", f"{anew} 0.05", f"{anew} 5")
        )
        training = start(run, f"{flags} {anew} 0.05", load=folder)[0]
        assert training.optimizer.clip_grad == 0.05
        for group in training.optimizer.param_groups:
            assert tuple(group["betas"]) == (0.5, 0.95) and group["eps"] == 1e-3
        assert kept[0] == halved[0] == loose[0], "the state is that of the checkpoint"
        assert len({kept[1], halved[1], loose[1]}) == 3, (stage, kept, halved, loose)
    return ""


@CHECKS.add(world_size=2)
def a_checkpoint_is_a_hugging_face_folder(run: Run) -> str:
    """transformers gives its next batch the loss of the run's next step, at ZeRO-3."""
    import torch
    from transformers import AutoModelForCausalLM

    flags = f"{FLAGS} --zero-stage 3 --micro-batch-size 2 --pack --data-path {chats(run)}"
    training, save = start(run, f"{flags} --save {run.folder / 'folder'}")
    steps_of(training, 2)
    saved = save()
    next_loss = steps_of(training, 1)[0][0]
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert model.dtype == torch.float32
    with torch.no_grad():
        loss = sft_loss(model, taken(training)[2]).item()
    return close([loss], [next_loss])


@CHECKS.add(world_size=1)
def a_checkpoint_goes_to_shards_and_back(run: Run) -> str:
    from qwen2_ascend.checkpoint import convert
    from qwen2_ascend.parallel import ParallelLayout

    flags = f"{FLAGS} --zero-stage 3 --micro-batch-size 4 --bf16 --data-path {chats(run)}"
    _, saved = steps_and_save(run, f"{flags} --save {run.folder / 'converted'}")
    shards, back = run.folder / "shards", run.folder / "back"
    layout = ParallelLayout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    for source, target, kind, to in (
        (saved, shards, "mg", layout),
        (shards, back, "hf", ParallelLayout()),
    ):
        request = convert.Conversion(
            load_dir=source, save_dir=target, save_model_type=kind, layout=to, verify=True
        )
        convert.convert(convert.prepare(request))
    assert data_of(back) == data_of(saved)
    return "bf16, TP2 PP2, bit-equal"


@CHECKS.add(world_size=2)
def weights_of_shards_and_of_the_folder_are_the_same(run: Run) -> str:
    """--load takes converted shards as it takes a Hugging Face folder."""
    import torch

    from qwen2_ascend.checkpoint import convert
    from qwen2_ascend.parallel import ParallelLayout

    source, shards = hugging_face_folder(run), run.folder / "tp2"
    if run.runtime.rank == 0:
        layout = ParallelLayout(tensor_model_parallel_size=2)
        request = convert.Conversion(
            load_dir=source, save_dir=shards, save_model_type="mg", layout=layout
        )
        convert.convert(convert.prepare(request))
    torch.distributed.barrier()
    flags = f"{FLAGS} --zero-stage 3 --micro-batch-size 2 --data-path {chats(run)}"
    found = [steps_of(start(run, flags, load=folder)[0], 2)[0] for folder in (source, shards)]
    assert found[0] == found[1], found
    return str(found[0])


@CHECKS.add(world_size=1)
def code_in_a_checkpoint_is_not_run(run: Run) -> str:
    """DeepSpeed's files are pickles: one that calls something is refused, and nothing is called."""
    folder, mark = run.folder / "hostile", run.folder / "was-run"
    flags = f"{FLAGS} --zero-stage 2 --micro-batch-size 8 --data-path {chats(run)} --save {folder}"
    _, saved = steps_and_save(run, flags)
    assert start(run, flags, load=folder)[0].progress.iteration == 2
    (saved / "qwen2_ascend_manifest.json").unlink()  # whose checksums would refuse it already
    for path in (saved / "zero").glob("*.pt"):
        path.write_bytes(pickle.dumps(Hostile(str(mark)), protocol=2))
        with pytest.raises(UserError, match="was not read"):
            start(run, flags, load=folder)
        assert not mark.exists(), path
    resumed, _ = start(run, f"{flags} --no-load-optim", load=folder)
    assert resumed.progress.iteration == 2 and not mark.exists()
    return ""


class Hostile:
    """Creates a file when it is unpickled by anything that calls what a pickle names."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (open, (self.mark, "w"))


@CHECKS.add(world_size=1)
def another_stage_is_refused_and_its_weights_taken(run: Run) -> str:
    flags = f"{FLAGS} --micro-batch-size 8 --data-path {chats(run)} --save {run.folder / 'cut'}"
    steps_and_save(run, f"{flags} --zero-stage 1")
    with pytest.raises(UserError, match=r"ZeRO stage 1 on 1 rank\(s\), this is stage 3"):
        start(run, f"{flags} --zero-stage 3", load=run.folder / "cut")
    again, _ = start(run, f"{flags} --zero-stage 3 --no-load-optim", load=run.folder / "cut")
    return str(steps_of(again, 1)[0])


# --- LoRA ----------------------------------------------------------------------------------------


@CHECKS.add(world_size=2)
def lora_runs_go_from_one_path_to_the_other(run: Run) -> str:
    """Begun on either path or at any stage, gone on with on another: the undisturbed losses."""
    from finetuning.finetune_worker import start as start_megatron

    zero = flags_of(run, f"--zero-stage 2 --micro-batch-size 2 --pack {LORA}")
    zero3 = flags_of(run, f"--zero-stage 3 --micro-batch-size 4 --pack {{divided}} {LORA}")
    tp2 = flags_of(run, f"--micro-batch-size 2 --pack --tensor-model-parallel-size 2 {LORA}")
    expected, _ = steps_of(start_megatron(run, tp2).run)
    folders = {name: run.folder / f"lora-{name}" for name in ("zero", "zero3", "tp2")}
    for name, flags in (("zero", zero), ("zero3", zero3)):
        losses, saved = steps_and_save(run, f"{flags} --save {folders[name]}")
        close(losses, expected[:2])
        assert sorted(path.name for path in saved.iterdir()) == sorted(LORA_FILES)
    begun = start_megatron(run, f"{tp2} --save {folders['tp2']}")
    steps_of(begun.run, 2)
    begun.save()
    for before, after in (("zero", zero3), ("tp2", zero)):
        again, _ = start(run, after, load=folders[before])
        assert again.progress.consumed_samples == 16
        close(steps_of(again, 2)[0], expected[2:])
    megatron = start_megatron(run, tp2, load=folders["zero3"])
    return close(steps_of(megatron.run, 2)[0], expected[2:])


LORA_FILES = {
    *("adapter_config.json", "adapter_model.safetensors", "run.json"),
    "qwen2_ascend_manifest.json",
    *("exp_avg.safetensors", "exp_avg_sq.safetensors", "rng_00000.pt", "rng_00001.pt"),
}


@CHECKS.add(world_size=2)
def peft_gives_the_loss_of_the_saved_adapter(run: Run) -> str:
    """What --save-adapter writes at ZeRO-3, in peft, on the next batch; and it starts a new run."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from qwen2_ascend.finetuning.deepspeed.lora_checkpoint import ZeroLora

    flags = flags_of(run, f"--zero-stage 3 --micro-batch-size 2 --pack {{divided}} {LORA}")
    training, _ = start(run, flags)
    steps_of(training, 2)
    folder, base = run.folder / "zero-adapter", hugging_face_folder(run)
    ZeroLora(training, None, lora_config(), base).export(folder, {})
    next_loss = steps_of(training, 1)[0][0]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    with torch.no_grad():
        loss = sft_loss(model, taken(training)[2]).item()
    new, _ = start(run, flags.replace(LORA, f"--lora-load {folder}"))
    first = steps_of(new, 1)[0][0]
    with torch.no_grad():
        close([sft_loss(model, taken(training)[0]).item()], [first])
    return close([loss], [next_loss])


@CHECKS.add(world_size=1)
def a_loss_scale_is_kept_in_terms_of_either_path(run: Run) -> str:
    """fp16 is not there on a CPU: DeepSpeed's scaler alone, with and without overflow."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    from qwen2_ascend.finetuning.deepspeed.lora_checkpoint import load_scaler_state, scaler_state

    def scaler() -> Any:
        return DynamicLossScaler(2.0**8, 3, 1.0, 2, False)

    overflows = [True, False, False, False, True, True, False, False, False, False, True, False]
    undisturbed = scaler()
    for step, overflow in enumerate(overflows):
        resumed = scaler()
        load_scaler_state(resumed, scaler_state(undisturbed))
        undisturbed.update_scale(overflow)
        for later in (overflow, *overflows[step + 1 : step + 5]):
            resumed.update_scale(later)
        twin = scaler()
        for earlier in overflows[: step + 5]:
            twin.update_scale(earlier)
        assert scaler_state(resumed) == scaler_state(twin), step
    return str(scaler_state(undisturbed))


def flags_of(run: Run, flags: str) -> str:
    """`{divided}` stands for a configuration that divides small weights too."""
    config = run.folder / "divided.json"
    if run.runtime.rank == 0:
        config.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    run.runtime.barrier()
    named = flags.format(divided=f"--deepspeed-config {config}")
    return f"{FLAGS} {named} --data-path {chats(run)}"


def adapted(model: Any) -> None:
    """The reference's model with the adapters that LORA names."""
    from finetuning.lora_worker import adapt

    model.requires_grad_(False)
    assert len(adapt(model, lora_config())) == 16


def lora_config() -> Any:
    """What LORA says."""
    from qwen2_ascend.lora_config import LoraConfig

    return LoraConfig(rank=3, alpha=7, targets=("q_proj", "v_proj", "up_proj", "down_proj"))


def close(losses: list[float], expected: list[float]) -> str:
    """How far they are apart, which is no more than the tolerance."""
    worst = apart(losses, expected)
    assert worst <= LOSS_TOLERANCE, (losses, expected)
    return f"{worst:.1e}"


# --- numbers -------------------------------------------------------------------------------------


@CHECKS.add(world_size=2)
def what_is_not_finite_does_not_reach_the_weights(run: Run) -> str:
    """One rank's gradient is not finite: no rank updates; the run stops or goes on, as said."""
    from qwen2_ascend.training.loop import NonFiniteError

    for stage, policy in ((1, "stop"), (2, "skip"), (3, "stop"), (3, "skip")):
        flags = f"{FLAGS} --zero-stage {stage} --micro-batch-size 4 --data-path {chats(run)}"
        training, _ = start(run, f"{flags} --on-nonfinite {policy}")
        norm = training.model.model.norm.weight
        hook = norm.register_hook(
            lambda grad: grad * (float("inf") if run.runtime.rank == 1 else 1.0)
        )
        before = weights_of(training)
        try:
            result = training.step(training.batches())
            assert policy == "skip" and not result.updated, (stage, policy, result)
        except NonFiniteError as error:
            assert policy == "stop" and "have not been changed" in str(error)
        hook.remove()
        assert weights_of(training) == before, (stage, policy)
        if policy == "skip":
            assert training.step(training.batches()).updated, stage
    return ""


@CHECKS.add(world_size=2)
def angles_are_computed_in_fp32(run: Run) -> str:
    """bf16 frequencies turn distant tokens to other angles; zero.Init would make them bf16."""
    import torch
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    for stage in (2, 3):
        flags = f"--zero-stage {stage} --bf16 --micro-batch-size 2 --data-path {chats(run)}"
        model = start(run, f"{FLAGS} {flags}")[0].model
        assert next(model.parameters()).dtype == torch.bfloat16
        expected = Qwen2RotaryEmbedding(model.config).inv_freq
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32
        assert torch.equal(model.model.rotary_emb.inv_freq, expected)
    return ""


@CHECKS.add(world_size=1)
def fp16_is_refused_where_deepspeed_has_none(run: Run) -> str:
    from deepspeed.accelerator import get_accelerator

    without = mock.patch.object(type(get_accelerator()), "is_fp16_supported", lambda self: False)
    with without, pytest.raises(UserError, match="--fp16") as caught:  # some CPUs have it
        start(run, f"{FLAGS} --fp16 --micro-batch-size 8 --data-path {chats(run)}")
    return str(caught.value)


# --- shared --------------------------------------------------------------------------------------


def start(run: Run, flags: str, load: Path | None = None) -> tuple[ZeroRun, Callable[[], Path]]:
    """A run as `launch/finetune_qwen2_deepspeed.py` builds it, and what saves its state."""
    from qwen2_ascend.finetuning.deepspeed.finetune import checkpointer, lora_storage, prepare
    from qwen2_ascend.finetuning.deepspeed.launch import make_plan
    from qwen2_ascend.finetuning.deepspeed.settings import parse, validate

    plan = make_plan(parse([*flags.split(), "--load", str(load or hugging_face_folder(run))]))
    forget_groups()
    join(run, plan, validate)
    training, plan = prepare(plan, run.runtime)
    make = checkpointer(training, plan, lora_storage(training, plan))
    return training, functools.partial(save_once, training, make)


def data_of(folder: Path) -> bytes:
    """All tensors of a folder's only file, in its order; its header also says who wrote it."""
    written = (folder / "model.safetensors").read_bytes()
    return written[8 + int.from_bytes(written[:8], "little") :]


def forget_groups() -> None:
    """DeepSpeed keeps groups of one engine for the next; between checks all groups are closed."""
    if groups := sys.modules.get("deepspeed.utils.groups"):
        groups._WORLD_GROUP = groups._DATA_PARALLEL_GROUP = None


def steps_and_save(run: Run, flags: str) -> tuple[list[float], Path]:
    """The losses of two steps, and their checkpoint."""
    training, save = start(run, flags)
    losses, _ = steps_of(training, 2)
    return losses, save()


def weights_of(training: ZeroRun) -> list[bytes]:
    weights = []
    for parameter in training.model.parameters():
        with training.whole([parameter]):
            weights.append(parameter.detach().float().numpy().tobytes())
    return weights


if __name__ == "__main__":
    main(CHECKS)
