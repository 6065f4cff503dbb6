"""Command lines of align_qwen2.py, run one after the other for test_align.py.

`python command_lines.py FOLDER`: FOLDER holds the models `hf`, `other` and `other-key`;
what became of each goes to FOLDER/results.json.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
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


def run(line: Line) -> dict[str, object]:
    from qwen2_ascend.alignment.align import main
    from qwen2_ascend.runtime import startup

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([*line.flags.split(), "--device", "cpu"])
    if startup._current is not None:
        startup._current.close()  # a refused run leaves this to the end of its process
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    results = {name: run(line) for name, line in COMMANDS.items()}
    Path("results.json").write_text(json.dumps(results), encoding="utf-8")
