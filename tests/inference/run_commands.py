"""Runs several command lines in one process, for test_generate.py and its like.

`python run_commands.py COMMANDS.json RESULTS.json`: a list of {"program", "flags", "stdin"}, and
for each the exit status and what was written to stdout and stderr.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

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
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(command["flags"])
        except SystemExit as exit_:
            status = exit_.code
    if startup._current is not None:
        startup._current.close()  # a failed run leaves this to the end of its process
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    given, written = map(Path, sys.argv[1:])  # a program may change sys.argv
    results = [run(command) for command in json.loads(given.read_text(encoding="utf-8"))]
    written.write_text(json.dumps(results), encoding="utf-8")
