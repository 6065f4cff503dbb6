"""Runs several command lines of pretrain_qwen2 in one process, for test_pretrain.py.

`python run_commands.py COMMANDS.json RESULTS.json`: a list of lists of flags, and for each the exit
status and what was written to stdout and stderr.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path


def run(flags: list[str]) -> dict[str, object]:
    from qwen2_ascend.runtime import startup
    from qwen2_ascend.training.pretrain import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(flags)
        except SystemExit as exit_:
            status = exit_.code
    if startup._current is not None:
        startup._current.close()  # a failed run leaves this to the end of its process
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    commands = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    results = [run(flags) for flags in commands]
    Path(sys.argv[2]).write_text(json.dumps(results), encoding="utf-8")
