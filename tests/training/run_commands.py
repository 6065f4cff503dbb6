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
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import IO


def run(main: Callable[[list[str]], int], flags: list[str]) -> dict[str, object]:
    from qwen2_ascend.runtime import startup

    out = io.StringIO()
    with contextlib.redirect_stdout(out), written_to_stderr() as err:
        try:
            status = main(flags)
        except SystemExit as exit_:
            status = exit_.code
    if startup._current is not None:
        startup._current.close()  # a failed run leaves this to the end of its process
    err.seek(0)
    return {"status": status, "out": out.getvalue(), "err": err.read().decode()}


@contextlib.contextmanager
def written_to_stderr() -> Iterator[IO[bytes]]:
    """A file with all that is written there: an end in words is written past Python's buffers."""
    file, kept = tempfile.TemporaryFile(), os.dup(2)  # noqa: SIM115 - read by the caller
    sys.stderr.flush()
    os.dup2(file.fileno(), 2)
    try:
        yield file
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


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
