"""The flags of fine-tuning: what is refused, all at once, and what epochs come to."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import tiny_config
from qwen2_ascend.errors import UserError
from qwen2_ascend.finetuning.deepspeed import settings as zero
from qwen2_ascend.finetuning.exports import find_exports
from qwen2_ascend.finetuning.settings import parse, validate
from qwen2_ascend.training.plan import RunPlan

NEEDED = "--config 0.5B --seq-length 32 --lr 1e-5 --data-path chats"


def faults_of(flags: str, world_size: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        validate(parse([*NEEDED.split(), *flags.split()]), tiny_config(), world_size)
    return "\n".join(caught.value.faults)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "give one of --train-iters, --train-samples and --num-train-epochs"),
        ("--train-iters 3 --num-train-epochs 1", "give one of --train-iters"),
        ("--num-train-epochs 0", "--num-train-epochs 0.0 must be above zero"),
        ("--train-iters 3 --dpo-beta 0", "--dpo-beta 0.0 must be above zero"),
        ("--train-iters 3 --dpo-label-smoothing 0.5", "from 0 to below 0.5"),
        ("--train-iters 3 --lora-r 0", "LoRA rank=0"),
        ("--train-iters 3 --lora-r 4 --lora-target-modules q", "LoRA target 'q' is not known"),
        ("--train-iters 3 --save-adapter out", "--save-adapter needs --lora-r or --lora-load"),
        ("--train-iters 3 --save-hf out", "--save-hf needs --save"),
        ("--train-iters 3 --eval-iters 2", "--eval-iters needs --valid-data-path"),
        ("--train-iters 3 --pad-to-multiple-of 0", "--pad-to-multiple-of 0 must be at least 1"),
        ("--train-iters 3 --pad-to-multiple-of 8", "8 needs --variable-seq-lengths"),
        ("--train-iters 3 --dpo-beta 0.5", "--dpo-beta needs --stage dpo"),
        ("--train-iters 3 --dpo-loss-type ipo", "--dpo-loss-type needs --stage dpo"),
        ("--train-iters 3 --dpo-label-smoothing 0.1", "--dpo-label-smoothing needs --stage dpo"),
        ("--train-iters 3 --pref-ftx 1", "--pref-ftx needs --stage dpo"),
        (
            "--train-iters 3 --train-data-path a --valid-data-path b",
            "--valid-data-path needs --eval-iters",
        ),
    ],
)
def test_contradictions_are_refused(flags: str, message: str) -> None:
    assert message in faults_of(flags)


def test_sequence_parallel_pads_batches_so_that_tensor_parallel_ranks_divide_them() -> None:
    flags = f"{NEEDED} --train-iters 3 --variable-seq-lengths --tensor-model-parallel-size 4"
    for given, padding in (("", 1), ("--sequence-parallel", 4)):
        assert parse(f"{flags} {given}".split()).pad_to_multiple_of == padding
    for given, padding in ((1, 4), (2, 4), (3, 12), (8, 8)):
        words = f"{flags} --sequence-parallel --pad-to-multiple-of {given}"
        assert parse(words.split()).pad_to_multiple_of == padding


def test_what_pairs_are_told_by_is_taken_where_there_are_pairs() -> None:
    flags = "--train-iters 3 --stage dpo --dpo-beta 0.5 --dpo-label-smoothing 0.1 --pref-ftx 1"
    validate(parse([*NEEDED.split(), *flags.split()]), tiny_config(), 1)


@pytest.mark.parametrize(
    ("flags", "is_noted"),
    [
        ("--split 98,2,0", True),
        ("--split 90,0.5", True),
        ("--split 98,2,0 --eval-iters 0", False),
        ("--split 98,2,0 --eval-iters 2", False),
        ("--split 100,0,0", False),
        ("--split 98,0.0,2", False),
        ("", False),
    ],
)
def test_a_share_that_nothing_measures_is_noted(flags: str, is_noted: bool) -> None:
    notes = parse(f"{NEEDED} --train-iters 3 {flags}".split()).data_notes
    assert len(notes) == is_noted and all("without --eval-iters" in note for note in notes)


@pytest.mark.parametrize("flag", ["--async-save", "--on-save-failure continue"])
def test_deepspeed_is_not_asked_to_write_all_weights_otherwise(flag: str) -> None:
    """It writes them itself, while training waits; adapters are written as everywhere."""
    words = f"{NEEDED} --train-iters 3 --save x {flag}"
    with pytest.raises(UserError, match=rf"{flag}: .* tune adapters: --lora-r"):
        zero.validate(zero.parse(words.split()), tiny_config(), 1)
    zero.validate(zero.parse(f"{words} --lora-r 4".split()), tiny_config(), 1)


def test_all_faults_are_named_at_once() -> None:
    found = faults_of("--stage dpo --dpo-beta 0 --lora-r 0 --micro-batch-size 0")
    assert found.count("\n") == 3, found


def test_a_folder_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    flags = f"{NEEDED} --train-iters 3 --save {tmp_path}/run --save-hf {tmp_path}"
    plan = RunPlan(settings=parse(flags.split()), config=tiny_config(), world_size=1, source=None)
    with pytest.raises(UserError, match="is there already"):
        find_exports(plan)


@pytest.mark.parametrize(
    ("epochs", "samples", "steps"), [(1, 16, 2), (1, 17, 3), (2.5, 16, 5), (0.01, 16, 1)]
)
def test_epochs_are_told_in_steps(epochs: float, samples: int, steps: int) -> None:
    flags = f"{NEEDED} --num-train-epochs {epochs} --global-batch-size 8"
    settings = parse(flags.split()).with_epochs(samples, world_size=1)
    assert settings.length(1).train_iters == steps
