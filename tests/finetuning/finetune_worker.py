"""Fine-tuning at every layout: losses over several steps against transformers and torch's AdamW.

The reference sees each chat alone, without packing or padding, and knows preference pairs only by
the formula of the paper.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from distributed import trainings
from distributed.harness import Checks, Run, main
from distributed.trainings import PP2, RECOMPUTE, TP2, VPP2, apart, join, save_once, tiny_folder
from helpers import tiny_config
from logs import logged_lines
from qwen2_ascend.errors import UserError

if TYPE_CHECKING:
    import torch

    from qwen2_ascend.training.loop import TrainingRun

TOLERANCE = 5e-7
STEPS, LENGTH, GLOBAL_BATCH, LR, CLIP = 4, 32, 8, 3e-3, 0.3
CHATS, PAIRS = 26, 10

REFERENCE = "dpo_reference.safetensors"

CHECKS = Checks()

FLAGS = (
    f"--seq-length {LENGTH} --global-batch-size {GLOBAL_BATCH} --train-iters {STEPS} --lr {LR} "
    f"--lr-decay-style constant --clip-grad {CLIP} --device cpu "
    f"--weight-decay {trainings.WEIGHT_DECAY}"
)
SFT = {
    "one-by-one": (1, "--micro-batch-size 1"),
    "all-at-once": (1, "--micro-batch-size 8"),
    "variable": (1, "--micro-batch-size 2 --variable-seq-lengths"),
    "packed": (1, "--micro-batch-size 1 --pack"),
    "packed-rows": (1, "--micro-batch-size 4 --pack"),
    "packed-swapped": (1, "--micro-batch-size 2 --pack --swap-attention"),
    "packed-recompute": (1, f"--micro-batch-size 2 --pack {RECOMPUTE}"),
    "tp2-sp-packed": (2, f"{TP2} --sequence-parallel --micro-batch-size 2 --pack"),
    "tp2-sp-variable": (
        2,
        f"{TP2} --sequence-parallel --micro-batch-size 2 --variable-seq-lengths",
    ),
    "pp2-packed": (2, f"{PP2} --micro-batch-size 2 --pack"),
    "pp2-packed-swapped": (
        2,
        f"{PP2} --micro-batch-size 2 --pack --swap-attention --recompute-activation-function "
        "--recompute-norm",
    ),
    "pp2-variable": (2, f"{PP2} --micro-batch-size 2 --variable-seq-lengths"),
    "pp2-vpp2-packed": (2, f"{VPP2} --micro-batch-size 1 --pack"),
    "dp2-packed": (2, "--use-distributed-optimizer --micro-batch-size 1 --pack"),
    "tp2-pp2-packed": (4, f"{TP2} {PP2} --micro-batch-size 2 --pack"),
    "pp4-packed": (4, "--pipeline-model-parallel-size 4 --micro-batch-size 2 --pack"),
}
DPO = {
    "sigmoid": (1, "--micro-batch-size 2 --dpo-label-smoothing 0.1 --pref-ftx 0.5"),
    "ipo": (1, "--micro-batch-size 4 --dpo-loss-type ipo"),
    "hinge": (1, "--micro-batch-size 4 --dpo-loss-type hinge --variable-seq-lengths"),
    "tp2-sp": (2, f"{TP2} --sequence-parallel --micro-batch-size 2"),
    "pp2": (2, f"{PP2} --micro-batch-size 2"),
    "dp2": (2, "--use-distributed-optimizer --micro-batch-size 2"),
    "tp2-pp2": (4, f"{TP2} {PP2} --micro-batch-size 2"),
}


# --- chats ---------------------------------------------------------------------------------------


def sft_losses_are_those_of_transformers(flags: str, run: Run) -> str:
    training = start(run, f"{FLAGS} {flags} --data-path {chats(run)}").run
    batches = taken(training)
    losses, norms = trained(training)
    expected, expected_norms = reference(hugging_face_folder(run), batches, sft_loss)
    return compared(losses, expected, norms, expected_norms)


def sft_loss(model: Any, batch: list[dict[str, Any]]) -> torch.Tensor:
    """The mean over the trained tokens of all chats, each of them run alone."""
    import torch

    losses = [token_losses(model, *chat) for sample in batch for chat in alone(sample)]
    return torch.cat(losses).double().mean().float()


def alone(sample: dict[str, Any]) -> list[tuple[Any, Any, Any]]:
    """(tokens, labels, mask) of each chat of a sample; padding is left out."""
    ends = sample.get("ends", (len(sample["tokens"]),))
    parts = [
        tuple(sample[key][start:end] for key in ("tokens", "labels", "loss_mask"))
        for start, end in pairwise((0, *ends))
    ]
    return [part for part in parts if part[2].any()]


def token_losses(model: Any, tokens: Any, labels: Any, mask: Any) -> torch.Tensor:
    import torch

    logits = model(tokens[None], use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")[mask.bool()]


for _name, (_world_size, _flags) in SFT.items():
    CHECKS.case(f"sft-{_name}", _world_size, sft_losses_are_those_of_transformers, _flags)


@CHECKS.add(world_size=1)
def accumulation_does_not_change_the_loss(run: Run) -> str:
    """8 micro-batches of 1 and 1 of 8 weigh every token alike, though chats differ in length."""
    found = []
    for size in (1, 8):
        training = start(run, f"{FLAGS} --micro-batch-size {size} --data-path {chats(run)}").run
        counts = [int(sample["loss_mask"].sum()) for sample in taken(training)[0]]
        assert len(set(counts)) > 2, counts
        found.append(trained(training)[0])
    difference = apart(*found)
    assert difference <= TOLERANCE, found
    return f"{difference:.1e}"


# --- preference pairs ----------------------------------------------------------------------------


def dpo_losses_are_those_of_the_formula(flags: str, run: Run) -> str:
    training = start(run, f"{FLAGS} --stage dpo {flags} --data-path {pairs(run)}").run
    batches = taken(training)
    losses, norms = trained(training)
    tuning = training.settings.tuning
    expected, expected_norms = reference(
        hugging_face_folder(run), batches, functools.partial(dpo_loss, [], tuning)
    )
    return compared(losses, expected, norms, expected_norms)


def dpo_loss(
    first_seen: list[Any], tuning: Any, model: Any, batch: list[dict[str, Any]]
) -> torch.Tensor:
    """The paper's loss; the reference is what a first, unchanged model said."""
    import torch

    beta, losses = tuning.dpo_beta, []
    if not first_seen:
        first_seen.append(copy.deepcopy(model))
    for pair in batch:
        now = [answer(model, pair[side]) for side in ("chosen", "rejected")]
        with torch.no_grad():
            then = [answer(first_seen[0], pair[side]) for side in ("chosen", "rejected")]
        gains = [a.sum() - b.sum() for a, b in zip(now, then, strict=True)]
        if tuning.dpo_loss_type == "ipo":
            gains = [gain / len(a) for gain, a in zip(gains, now, strict=True)]
        margin = gains[0] - gains[1]
        if tuning.dpo_loss_type == "ipo":
            loss = (margin - 1 / (2 * beta)) ** 2
        elif tuning.dpo_loss_type == "hinge":
            loss = torch.clamp(1 - beta * margin, min=0)
        else:
            right, e = torch.sigmoid(beta * margin), tuning.dpo_label_smoothing
            loss = -(1 - e) * torch.log(right) - e * torch.log(1 - right)
        losses.append(loss - tuning.pref_ftx * now[0].mean())
    return torch.stack(losses).mean()


def answer(model: Any, side: dict[str, Any]) -> torch.Tensor:
    (chat,) = alone(side)
    return -token_losses(model, *chat)


for _name, (_world_size, _flags) in DPO.items():
    CHECKS.case(f"dpo-{_name}", _world_size, dpo_losses_are_those_of_the_formula, _flags)


@CHECKS.add(world_size=2)
def a_resumed_dpo_run_keeps_its_reference(run: Run) -> str:
    """Two steps, then two more from the checkpoint, are the four of an undisturbed run."""
    flags = f"{TP2} --stage dpo --micro-batch-size 2 --data-path {pairs(run)}"
    return resumed_losses(run, "dpo", flags, flags, tolerance=0.0)


@CHECKS.add(world_size=2)
def a_dpo_run_that_moves_on_takes_its_reference_along(run: Run) -> str:
    """Each start saves into a folder of its own; the third knows nothing of the first's."""
    from safetensors.torch import safe_open

    flags = f"{FLAGS} {TP2} --stage dpo --micro-batch-size 2 --data-path {pairs(run)}"
    expected, _ = trained(start(run, flags).run)
    losses, load = [], None
    for number, steps in enumerate((2, 1, 1)):
        folder = run.folder / f"dpo-on-{number}"
        prepared = start(run, f"{flags} --save {folder}", load=load)
        losses += trained(prepared.run, steps=steps)[0]
        prepared.save()
        load = folder
    assert losses == expected, (losses, expected)
    kept = []
    for number in range(3):
        with safe_open(run.folder / f"dpo-on-{number}" / REFERENCE, "pt") as file:
            kept.append((file.metadata(), file.get_tensor("log_probs")))
    for metadata, log_probs in kept:
        assert log_probs.equal(kept[0][1])
        assert metadata == kept[0][0], "it is said to be of other pairs or weights"
    return str(losses)


@CHECKS.add(world_size=1)
def a_refused_start_leaves_the_reference_of_the_run_that_has_the_folder(run: Run) -> str:
    """What another run has written there all the same is not taken for this run's, either."""
    from qwen2_ascend.checkpoint.staging import FolderLock

    folder = run.folder / "dpo-taken"
    flags = f"{FLAGS} --stage dpo --micro-batch-size 4 --data-path {pairs(run)}"
    first = start(run, f"{flags} --save {folder}")
    trained(first.run, steps=2)
    first.save()
    before, lock = (folder / REFERENCE).read_bytes(), FolderLock(folder)
    lock.acquire()
    model = tiny_folder(run, "another-model", ffn_hidden_size=64)
    with pytest.raises(UserError, match="another process is writing it"):
        start(run, f"{flags} --save {folder}", load=model).save()
    lock.release()
    assert (folder / REFERENCE).read_bytes() == before
    start(run, f"{flags} --save {folder}", load=folder)

    other = run.folder / "dpo-of-another"
    start(run, f"{flags} --save {other}", load=model).save()
    shutil.copyfile(other / REFERENCE, folder / REFERENCE)
    with pytest.raises(UserError, match="is not the reference that it began with") as caught:
        start(run, f"{flags} --save {folder}", load=folder)
    return str(caught.value)


@CHECKS.add(world_size=1)
def validation_of_a_resumed_dpo_run_is_by_its_first_model(run: Run) -> str:
    """Pairs that it has not scored are left out, and the run goes on; those it has stay."""
    from qwen2_ascend.finetuning.dpo import UNSCORED

    flags = f"{FLAGS} --stage dpo --micro-batch-size 4 --data-path {pairs(run)} --split 80,20,0"
    found = None
    for name, first in (("without", ""), ("with", "--eval-iters 1")):
        folder = run.folder / f"dpo-valid-{name}"
        begun = start(run, f"{flags} --save {folder} {first}")
        trained(begun.run, steps=2)
        begun.save()
        for later in ("", "--eval-iters 1", ""):
            with logged_lines() as lines:
                again = start(run, f"{flags} --save {folder} {later}", load=folder)
            again.save()
            is_scored = bool(first and later)
            assert (again.run.valid_data is not None) == is_scored
            assert (UNSCORED.format("") in lines) == (bool(later) and not is_scored), lines
            if is_scored:
                assert again.run.objective.reference.equal(begun.run.objective.reference)
                found = again.run.evaluate()
    return str(found)


@CHECKS.add(world_size=1)
def a_reference_of_an_older_release_is_taken(run: Run) -> str:
    """Which has one tensor and one hash for the pairs of training and validation together."""
    import torch
    import xxhash
    from safetensors.torch import safe_open, save_file

    folder = run.folder / "dpo-older"
    flags = f"{FLAGS} --stage dpo --micro-batch-size 4 --data-path {pairs(run)} --split 80,20,0"
    flags += f" --eval-iters 1 --save {folder}"
    begun = start(run, flags)
    trained(begun.run, steps=2)
    begun.run.marks = {}
    begun.save()
    rows = xxhash.xxh3_64()
    for source in (begun.run.train_data.source, begun.run.valid_data.data.source):
        for pair in (source[index] for index in range(len(source))):
            for side in pair.values():
                rows.update(side["tokens"].numpy().tobytes())
                rows.update(side["loss_mask"].numpy().tobytes())
    with safe_open(folder / REFERENCE, "pt") as file:
        weights = file.metadata()["weights"]
    metadata = {"pairs": rows.hexdigest(), "weights": weights}
    reference = begun.run.objective.reference
    save_file({"log_probs": reference}, folder / REFERENCE, metadata)
    again = start(run, flags, load=folder)
    assert torch.equal(again.run.objective.reference, reference)
    return str(tuple(reference.shape))


# --- LoRA ----------------------------------------------------------------------------------------

LORA = "--lora-r 4 --lora-alpha 8 --micro-batch-size 2"


@CHECKS.add(world_size=2)
def a_resumed_lora_run_goes_on(run: Run) -> str:
    flags = f"{TP2} {LORA} --lora-dropout 0.1 --data-path {chats(run)} --pack"
    said = resumed_losses(run, "lora", flags, flags, tolerance=0.0)
    state = json.loads((run.folder / "lora" / "iter_0000002" / "run.json").read_text())
    assert state["base_model"].keys() == {"stored_as", "values"}, state
    return said


@CHECKS.add(world_size=2)
def a_lora_run_is_resumed_at_another_layout(run: Run) -> str:
    flags = f"{LORA} --data-path {chats(run)} --pack"
    return resumed_losses(run, "lora-moved", f"{VPP2} {flags}", f"{TP2} {flags}", tolerance=5e-7)


@CHECKS.add(world_size=2)
def a_bf16_lora_run_is_resumed(run: Run) -> str:
    flags = f"{PP2} {LORA} --bf16 --use-distributed-optimizer --data-path {chats(run)}"
    return resumed_losses(run, "lora-bf16", flags, flags, tolerance=0.0)


@CHECKS.add(world_size=2)
def lora_with_preference_pairs_is_the_same_at_any_layout(run: Run) -> str:
    """The reference is the base model: the adapters change nothing before the first step."""
    import math

    found = []
    for layout in (TP2, PP2, "--use-distributed-optimizer"):
        flags = f"{FLAGS} {layout} --stage dpo {LORA} --data-path {pairs(run)}"
        found.append(trained(start(run, flags).run)[0])
    assert abs(found[0][0] - math.log(2)) < 1e-6, found[0]
    assert found[0][-1] < found[0][0], found[0]
    worst = max(apart(found[0], other) for other in found[1:])
    assert worst <= TOLERANCE, found
    return f"{worst:.1e}"


def resumed_losses(run: Run, name: str, before: str, after: str, tolerance: float) -> str:
    """Two steps, and two more from their checkpoint, against four undisturbed ones."""
    expected, _ = trained(start(run, f"{FLAGS} {before}").run)
    folder = run.folder / name
    first = start(run, f"{FLAGS} {before} --save {folder}")
    losses, _ = trained(first.run, steps=2)
    first.save()
    again = start(run, f"{FLAGS} {after} --save {folder}", load=folder)
    losses += trained(again.run, steps=2)[0]
    difference = apart(expected, losses)
    assert difference <= tolerance, (expected, losses)
    assert max(expected) - min(expected) > 1e-4, expected
    return f"{difference:.1e}"


@CHECKS.add(world_size=2)
def ranks_take_one_reference_for_all_copies_of_the_weights(run: Run) -> str:
    """Each node has a copy with a time of its own: whether the kept reference fits, rank 0 says."""
    import torch

    model, own = hugging_face_folder(run), run.folder / f"node{run.runtime.rank}"
    shutil.copytree(model, own)
    os.utime(own / "model.safetensors", (10**9, 10**9 + run.runtime.rank))
    torch.distributed.barrier()
    flags = f"{FLAGS} --stage dpo --micro-batch-size 4 --data-path {pairs(run)} "
    flags += f"--save {run.folder}/kept"
    references = []
    for _ in range(2):
        started = start(run, flags, load=own)
        started.save()
        references.append(started.run.objective.reference)
    assert torch.equal(*references)
    return str(tuple(references[0].shape))


# --- shared --------------------------------------------------------------------------------------


def compared(
    losses: list[float], expected: list[float], norms: list[float], expected_norms: list[float]
) -> str:
    differences = [abs(a - b) / max(1, b) for a, b in zip(losses, expected, strict=True)]
    assert max(differences) <= TOLERANCE, f"losses {losses}, transformers {expected}"
    worst = max(abs(a - b) / b for a, b in zip(norms, expected_norms, strict=True))
    assert worst <= 5e-6, f"gradient norms {norms}, transformers {expected_norms}"
    return json.dumps({"losses": losses, "from transformers": max(differences), "norms": worst})


class TuningRun(NamedTuple):
    """A run that can begin, and what writes its checkpoints."""

    run: TrainingRun
    save: Callable[[], Path]


def start(run: Run, flags: str, load: Path | None = None) -> TuningRun:
    """A run as `launch/finetune_qwen2.py` builds it."""
    from qwen2_ascend.finetuning.finetune import lora_storage, prepare
    from qwen2_ascend.finetuning.plan import make_plan
    from qwen2_ascend.finetuning.settings import parse, validate
    from qwen2_ascend.training.checkpointing import megatron_checkpointer
    from qwen2_ascend.training.setup import checkpoint_identity

    plan = make_plan(parse([*flags.split(), "--load", str(load or hugging_face_folder(run))]))
    join(run, plan, validate)
    training, plan = prepare(plan, run.runtime)
    storage, identity = lora_storage(training, plan), checkpoint_identity(plan)
    plain = functools.partial(megatron_checkpointer, training, identity)
    make = storage.checkpointer if storage else plain
    return TuningRun(training, functools.partial(save_once, training, make))


def taken(training: TrainingRun) -> list[list[dict[str, Any]]]:
    """The samples of each step."""
    data = training.train_data
    return [
        [data[step * GLOBAL_BATCH + place] for place in range(GLOBAL_BATCH)]
        for step in range(STEPS)
    ]


def trained(training: TrainingRun, steps: int = STEPS) -> tuple[list[float], list[float]]:
    batches = training.batches()
    results = [training.step(batches) for _ in range(steps)]
    return [result.loss for result in results], [result.grad_norm for result in results]


def reference(
    folder: Path, batches: list[list[dict[str, Any]]], loss_of: Any, change: Any = None
) -> tuple[list[float], list[float]]:
    """(losses, gradient norms) of transformers and torch.optim.AdamW alone, with FLAGS' numbers."""
    return trainings.reference(
        folder, batches, loss_of, lr=lambda step: LR, clip=CLIP, change=change
    )


def hugging_face_folder(run: Run) -> Path:
    return tiny_folder(run, "model")


def chats(run: Run) -> Path:
    """Chats of 4 to 20 tokens, written once."""
    return _written(run, "chats", CHATS, ("",))


def pairs(run: Run) -> Path:
    """Preference pairs, written once."""
    return _written(run, "pairs", PAIRS, ("chosen_", "rejected_"))


def _written(run: Run, name: str, count: int, sides: tuple[str, ...]) -> Path:
    import torch

    prefix = run.folder / name
    if run.runtime.rank == 0 and not list(run.folder.glob(f"{name}_*")):
        for number, side in enumerate(sides):
            _write(prefix, side, count, seed=number)
    torch.distributed.barrier()
    return prefix


def _write(prefix: Path, side: str, count: int, seed: int) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = torch.Generator().manual_seed(seed)
    paths = {key: f"{prefix}_packed_{side}{key}_document" for key in ("input_ids", "labels")}
    builders = {key: IndexedDatasetBuilder(f"{path}.bin") for key, path in paths.items()}
    for _ in range(count):
        length = int(torch.randint(4, 21, (), generator=generator))
        ids = torch.randint(0, tiny_config().vocab_size, (length,), generator=generator)
        asked = int(torch.randint(1, length - 1, (), generator=generator))
        labels = torch.where(torch.arange(length) < asked, -100, ids)
        for key, row in (("input_ids", ids), ("labels", labels)):
            builders[key].add_document(row, [length])
    for key, builder in builders.items():
        builder.finalize(f"{paths[key]}.idx")


if __name__ == "__main__":
    main(CHECKS)
