"""Commands that are killed before one of the calls by which they change the disk.

A `Driver` starts `python killing.py`, which imports everything once. It runs each command in a
forked child, which counts those calls and sends itself SIGKILL before the one that was asked for.
A process that is killed leaves its files as they are at that moment. So one run that copies its
folder before each of those calls shows what every kill would leave: `Driver.states`.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from commands import environment

FAILED = 99
"""The status of a command whose states could not be copied."""
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
        first: commands that it runs first, so that its children find warm caches; they start no
            thread.
        every_write: so many writes into files count as one call.
    """

    def __init__(
        self,
        folder: Path,
        modules: Sequence[str],
        first: Sequence[Sequence[str]] = (),
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
            env=environment(DS_ACCELERATOR="cpu"),
        )

    def run(self, module: str, flags: Sequence[object], point: int | None = None) -> Killed:
        """Runs the `main` of a module; without a `point` to its end."""
        return self._ask(module, flags, {"point": point} if point else {})

    def states(
        self,
        module: str,
        flags: Sequence[object],
        folder: Path,
        into: Path,
        can_exchange: bool = True,
    ) -> tuple[Path, ...]:
        """What `folder` held before each call of a whole run that changes the disk.

        Args:
            module: whose `main` is run.
            flags: its command line.
            folder: all that the command writes lies in it.
            into: a new folder, for the copies.
            can_exchange: whether the file system can exchange two folders in one step.

        Returns:
            Copies of the folder, in order; of equal states there is one.
        """
        into.mkdir()
        watch = {"folder": str(folder), "into": str(into), "can_exchange": can_exchange}
        ended = self._ask(module, flags, watch)
        assert ended.status == 0, f"{module} {' '.join(map(str, flags))}"
        return tuple(sorted(into.iterdir()))

    def _ask(self, module: str, flags: Sequence[object], watch: dict[str, Any]) -> Killed:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([module, list(map(str, flags)), watch]) + "\n")
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


class Watch:
    """Counts calls, of all threads, and does something before each; one call at a time.

    Args:
        before: gets the number of the call, from 1 on.
    """

    def __init__(self, before: Callable[[int], None]) -> None:
        self.calls = 0
        self._before = before
        self._lock = threading.RLock()
        self._is_before = False

    def on(self, function: Callable, every: int = 1) -> Callable:
        """The function; one of so many calls is counted."""
        made = 0

        @wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal made
            with self._lock:
                if not self._is_before:
                    if made % every == 0:
                        self.calls += 1
                        self._do_before()
                    made += 1
                return function(*args, **kwargs)

        return watched

    def _do_before(self) -> None:
        self._is_before = True
        try:
            self._before(self.calls)
        except Exception:
            traceback.print_exc()
            os._exit(FAILED)  # the command might survive it
        self._is_before = False


def kill_at(point: int | None) -> Callable[[int], None]:
    """Kills this process before the call with that number."""

    def before(call: int) -> None:
        if call == point:
            os.kill(os.getpid(), signal.SIGKILL)

    return before


def keep_states(folder: Path, into: Path) -> Callable[[int], None]:
    """Copies the folder into `into` where it differs from all that was copied before."""
    seen = {b""}

    def before(call: int) -> None:
        if (digest := folder_digest(folder)) not in seen:
            seen.add(digest)
            shutil.copytree(folder, into / f"{call:06d}", symlinks=True)

    return before


def folder_digest(folder: Path) -> bytes:
    """The hash of the names and the contents of a folder; it is empty where there is no folder."""
    if not folder.is_dir():
        return b""
    digest = xxhash.xxh3_128()
    for path in sorted(folder.rglob("*")):
        digest.update(f"{path.relative_to(folder)}\0".encode())
        if path.is_file():
            digest.update(path.read_bytes() + b"\0")
    return digest.digest()


def run(module: str, argv: list[str], asked: dict[str, Any], every_write: int) -> tuple[int, int]:
    """Status and calls of one command in a forked child."""
    if "into" in asked:
        before = keep_states(Path(asked["folder"]), Path(asked["into"]))
    else:
        before = kill_at(asked.get("point"))
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        from qwen2_ascend.checkpoint import staging

        watch = Watch(before)
        for name in DISK_CALLS:
            setattr(os, name, watch.on(getattr(os, name)))
        os.pwrite = watch.on(os.pwrite, every_write)
        can_exchange = asked.get("can_exchange", True)
        staging._exchange = watch.on(staging._exchange if can_exchange else lambda *_: False)
        if torch := sys.modules.get("torch"):
            torch.save = watch.on(torch.save)  # how DeepSpeed writes
        status = call(module, argv)
        os.write(write_end, str(watch.calls).encode())
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


def serve(modules: list[str], first: list[list[str]], every_write: int) -> None:
    """Answers a request on each line of stdin; what else is printed goes to the log."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    if any(name.startswith("megatron") for name in modules):
        from qwen2_ascend.runtime import cpu

        cpu.redirect_torch()
        cpu.redirect_megatron()
    for name in modules:
        import_module(name)
    if logging := sys.modules.get("qwen2_ascend.training.logging"):
        logging.draw_loss = lambda *_: None  # it takes as long as the rest of a short run
    for command, *flags in first:
        call(command, flags)
    gc.collect()
    gc.freeze()  # what is warm now is shared with every child
    for line in sys.stdin:
        print(json.dumps(run(*json.loads(line), every_write)), file=answers, flush=True)


if __name__ == "__main__":
    serve(*json.loads(sys.argv[1]))
