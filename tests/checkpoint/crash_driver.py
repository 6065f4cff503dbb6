"""Runs conversions that kill themselves, each in a forked child; started by test_crash.py.

Reads one JSON object per line: "argv" (of the command) and "point", the number of the call, among
those that change the disk, before which the child sends itself SIGKILL; null runs to the end.
Answers with the status (negative when killed) and how many such calls were made (only known when
the child ended by itself).
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import wraps

from qwen2_ascend.checkpoint import staging
from qwen2_ascend.checkpoint.command import main
from qwen2_ascend.cli import run_command

DISK_CALLS = ("pwrite", "ftruncate", "fsync", "rename", "replace", "unlink", "mkdir", "rmdir")


class Killer:
    """Counts calls and kills this process before the one with the given number."""

    def __init__(self, point: int | None) -> None:
        self.point = point
        self.calls = 0

    def watch(self, function: Callable) -> Callable:
        @wraps(function)
        def watched(*args, **kwargs):
            self.calls += 1
            if self.calls == self.point:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return watched


def run(argv: list[str], point: int | None) -> dict:
    """One conversion in a forked child."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        killer = Killer(point)
        for name in DISK_CALLS:
            setattr(os, name, killer.watch(getattr(os, name)))
        staging._exchange = killer.watch(staging._exchange)
        status = run_command(lambda: main(argv))
        os.write(write_end, str(killer.calls).encode())
        os._exit(status)
    os.close(write_end)
    _, status = os.waitpid(pid, 0)
    calls = os.read(read_end, 20)
    os.close(read_end)
    return {"status": os.waitstatus_to_exitcode(status), "calls": int(calls or 0)}


def serve() -> None:
    """Answers one request per line of stdin."""
    run_command(lambda: main(["--load-dir=/nowhere", "--save-dir=/no", "--save-model-type=hf"]))
    gc.collect()
    gc.freeze()  # what is warm now is shared with every child
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(run(request["argv"], request["point"])), flush=True)


if __name__ == "__main__":
    serve()
