"""Command lines of align_qwen2.py, in a folder with the models hf, other and other-key."""

from __future__ import annotations

from typing import NamedTuple

SHAPE = (2, 2, 12)
"""Micro-batches, sequences in each, tokens in each sequence."""
_BATCH = "--seq-length 12 --micro-batch-size 2 --global-batch-size 4"


class Line(NamedTuple):
    flags: str
    status: int
    told: str


COMMANDS = {
    "report": Line(f"--load hf {_BATCH} --train-iters 2 --report report", 0, "ALIGNED: 36"),
    "dump": Line(f"--load hf {_BATCH} --dump dump --dump-only --seed 7", 0, "dump: dump"),
    "compare": Line(
        f"--load hf {_BATCH} --compare-with dump --attention-backend unfused",
        0,
        "The run compared with: ALIGNED",
    ),
    "from-dump": Line("--load hf --from-dump dump", 0, "ALIGNED: 36 sublayers and 27 gradients"),
    "from-dump-forward": Line(
        "--load hf --from-dump dump --no-gradients", 0, "ALIGNED: 36 sublayers agree"
    ),
    "bf16": Line("--load hf --bf16 --seq-length 12 --no-gradients", 0, "ALIGNED: 36 sublayers a"),
    "fp16": Line("--load hf --fp16 --seq-length 12", 0, "ALIGNED: 36 sublayers and 27 gradients"),
    "fp16-parted": Line(
        "--load hf --fp16 --seq-length 12 --no-gradients --reference-model other-key",
        1,
        "PARTED at layer 1, key first",
    ),
    "parted": Line(
        "--load hf --reference-model other --seq-length 12 --no-gradients --json parted.json",
        1,
        "PARTED at embedding first",
    ),
    "other-shape": Line("--load hf --seq-length 8 --compare-with dump", 2, "say --seq-length 12"),
    "nothing": Line("--load nowhere", 2, "nowhere: no such folder"),
    "no-tokenizer": Line("--load hf --prompt hello", 2, "no tokenizer can be read"),
}
