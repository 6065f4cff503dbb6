"""Commands that are killed before one of the calls by which they change the disk.

A `Driver` starts `python killing.py`, which imports everything once. It runs each command in a
forked child, which counts those calls and sends itself SIGKILL before the one that was asked for.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from commands import environment

DISK_CALLS = ("ftruncate", "fsync", "rename", "replace", "unlink", "mkdir", "rmdir")


class Killed(NamedTuple):
    """How a command ended."""

    status: int
    """It is negative when the command was killed."""
    calls: int
    """How many calls changed the disk; known when the command ended by itself."""


class Driver:
    """The process that runs and kills commands.

    Args:
        folder: for its log.
        modules: what it imports first.
        first: a command that it runs first, so that its children find warm caches.
        every_write: so many writes into files count as one call.
    """

    def __init__(
        self,
        folder: Path,
        modules: Sequence[str],
        first: Sequence[str] = (),
        every_write: int = 1,
    ) -> None:
        self._log = (folder / "log").open("w")
        self._lines = (folder / "log").open()
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps([modules, first, every_write])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment(),
        )

    def run(self, module: str, flags: Sequence[object], point: int | None = None) -> Killed:
        """Runs the `main` of a module; without a `point` to its end."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([module, list(map(str, flags)), point]) + "\n")
        self._process.stdin.flush()
        return Killed(*json.loads(self._process.stdout.readline()))

    def said(self) -> str:
        """Everything that has been printed since the last time."""
        return self._lines.read()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()
        self._lines.close()


# --- the process ---------------------------------------------------------------------------------


class Killer:
    """Counts calls, of all threads, and kills this process before the one with a given number."""

    def __init__(self, point: int | None) -> None:
        self.point = point
        self.calls = 0
        self._lock = threading.Lock()

    def watch(self, function: Callable, every: int = 1) -> Callable:
        """The function; one of so many calls is counted."""
        made = 0

        @wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal made
            with self._lock:
                self.calls += made % every == 0
                if made % every == 0 and self.calls == self.point:
                    os.kill(os.getpid(), signal.SIGKILL)
                made += 1
            return function(*args, **kwargs)

        return watched


def run(module: str, argv: list[str], point: int | None, every_write: int) -> tuple[int, int]:
    """Status and calls of one command in a forked child."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        from qwen2_ascend.checkpoint import staging

        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        killer = Killer(point)
        for name in DISK_CALLS:
            setattr(os, name, killer.watch(getattr(os, name)))
        os.pwrite = killer.watch(os.pwrite, every_write)
        staging._exchange = killer.watch(staging._exchange)
        if torch := sys.modules.get("torch"):
            torch.save = killer.watch(torch.save)  # how DeepSpeed writes
        status = call(module, argv)
        os.write(write_end, str(killer.calls).encode())
        os._exit(status)
    os.close(write_end)
    _, status = os.waitpid(pid, 0)
    calls = os.read(read_end, 20)
    os.close(read_end)
    return os.waitstatus_to_exitcode(status), int(calls or 0)


def call(module: str, argv: list[str]) -> int:
    """The exit status of a command."""
    from qwen2_ascend.cli import run_command

    statuses: list[int | None] = []
    failed = run_command(lambda: statuses.append(import_module(module).main(argv)))
    return failed or statuses[0] or 0


def serve(modules: list[str], first: list[str], every_write: int) -> None:
    """Answers a request on each line of stdin."""
    if any(name.startswith("megatron") for name in modules):
        from qwen2_ascend.runtime import cpu

        cpu.redirect_torch()
        cpu.redirect_megatron()
    for name in modules:
        import_module(name)
    if first:
        call(first[0], first[1:])
    gc.collect()
    gc.freeze()  # what is warm now is shared with every child
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    for line in sys.stdin:
        print(json.dumps(run(*json.loads(line), every_write)), file=answers, flush=True)


if __name__ == "__main__":
    serve(*json.loads(sys.argv[1]))
