"""Runs several command lines in one process, for test_generate.py and its like.

`python run_commands.py COMMANDS.json RESULTS.json`: a list of {"program", "flags", "stdin"}, and
for each the exit status and what was written to stdout and stderr.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

PROGRAMS = {
    "generate": "qwen2_ascend.inference.generate",
    "evaluate": "qwen2_ascend.evaluation.evaluate",
    "pretrain": "qwen2_ascend.training.pretrain",
    "finetune": "qwen2_ascend.finetuning.finetune",
    "qwen2-ascend": "qwen2_ascend.cli",
}


def run(command: dict[str, Any]) -> dict[str, object]:
    from qwen2_ascend.runtime import startup

    main = import_module(PROGRAMS[command["program"]]).main
    out, err = io.StringIO(), io.StringIO()
    sys.stdin = io.StringIO(command.get("stdin", ""))
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        _descriptor_of_stderr() as complaints,
    ):
        try:
            status = main(command["flags"])
        except SystemExit as exit_:
            status = exit_.code
        complaints.seek(0)
        last_words = complaints.read().decode(errors="replace")
    if startup._current is not None:
        startup._current.close()  # a failed run leaves this to the end of its process
    return {"status": status, "out": out.getvalue(), "err": err.getvalue() + last_words}


@contextlib.contextmanager
def _descriptor_of_stderr() -> Iterator[BinaryIO]:
    """A file that takes what is written to descriptor 2 itself, as launchers' last words are."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield file
        finally:
            os.dup2(kept, 2)
            os.close(kept)


if __name__ == "__main__":
    given, written = map(Path, sys.argv[1:])  # a program may change sys.argv
    results = [run(command) for command in json.loads(given.read_text(encoding="utf-8"))]
    written.write_text(json.dumps(results), encoding="utf-8")
