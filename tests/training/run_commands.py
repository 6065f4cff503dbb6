"""Runs several command lines of a launcher in one process.

`python run_commands.py COMMANDS.json RESULTS.json [MODULE FOLDER]`: a list of lists of flags, and
for each the exit status and what was written to stdout and stderr. MODULE has the launcher's
`main`; with FOLDER also the names of what is in it after each of them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path


def run(main: Callable[[list[str]], int], flags: list[str]) -> dict[str, object]:
    from qwen2_ascend.runtime import startup

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
    module, *folders = sys.argv[3:] or ["qwen2_ascend.training.pretrain"]
    main = import_module(module).main
    results = []
    for flags in commands:
        results.append(run(main, flags))
        for folder in folders:
            results[-1]["there"] = os.listdir(folder)
    Path(sys.argv[2]).write_text(json.dumps(results), encoding="utf-8")
