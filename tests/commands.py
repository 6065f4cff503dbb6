"""Python programs that tests start: each in a process of its own, or many after one another in one.

`python commands.py` is that one process. It reads a line of JSON for each command, {"program",
"flags"}, with "stdin" where something is read there, and answers with the exit status, what was
written to stdout and stderr, and what is in the working folder then.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NamedTuple

TESTS = Path(__file__).parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
"""What goes before the number of processes and a script."""
PROGRAMS = {
    "align": "qwen2_ascend.alignment.command",
    "generate": "qwen2_ascend.inference.command",
    "evaluate": "qwen2_ascend.evaluation.command",
    "pretrain": "qwen2_ascend.training.command",
    "finetune": "qwen2_ascend.finetuning.command",
    "qwen2-ascend": "qwen2_ascend.cli",
}


SECONDS = 500
"""What a command may take on a busy machine."""


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str
    there: tuple[str, ...] = ()
    """What was in the folder that it ran in, where that was looked up."""

    def require(self, status: int = 0) -> Ended:
        """Fails the test where the command ended otherwise, or with a traceback."""
        assert self.status == status, f"status {self.status}, not {status}:\n{self.out}{self.err}"
        assert "Traceback" not in self.err, self.err
        return self


class World(NamedTuple):
    """A folder, and how each command ended that ran there."""

    folder: Path
    runs: Mapping[str, Ended]


def environment(**changes: str) -> dict[str, str]:
    """The variables of a process that finds the tests and the package."""
    paths = [str(TESTS), str(TESTS.parent / "plugin"), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, paths))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **changes}


def run_python(
    *words: object,
    status: int | None = 0,
    seconds: float = SECONDS,
    stdin: str = "",
    folder: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Ended:
    """Runs Python with `words`; the test fails where it does not end with `status`.

    Args:
        words: of the command line.
        status: the exit status; None for any.
        seconds: after which the process is killed.
        stdin: what it reads there.
        folder: where it runs; here, by default.
        environ: its variables, instead of `environment()`.
    """
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env=environment() if environ is None else environ,
        cwd=folder,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    said = f"exit status {done.returncode}\n{done.stdout[-5000:]}{done.stderr[-10000:]}"
    assert status is None or done.returncode == status, said
    return Ended(done.returncode, done.stdout, done.stderr)


class Commands(Mapping[str, Ended]):
    """How commands end that run in one process, in `folder`; each runs when somebody asks for it.

    Args:
        folder: where they run.
        commands: {"program", "flags"}, and "stdin", by name.
    """

    def __init__(self, folder: Path, commands: Mapping[str, Mapping[str, Any]]) -> None:
        self._folder, self._commands = folder, commands
        self._ended: dict[str, Ended] = {}
        self._process: subprocess.Popen[str] | None = None

    def __getitem__(self, name: str) -> Ended:
        if name not in self._ended:
            self._ended[name] = self._run(self._commands[name])
        return self._ended[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._commands)

    def __len__(self) -> int:
        return len(self._commands)

    def _run(self, command: Mapping[str, Any]) -> Ended:
        if self._process is None:
            words = [sys.executable, __file__]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._process = subprocess.Popen(
                words, cwd=self._folder, env=environment(), text=True, **pipes
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        assert select.select([self._process.stdout], [], [], SECONDS)[0], f"no end of {command}"
        answer = self._process.stdout.readline()
        assert answer, f"its process died of {command}"
        return Ended(**json.loads(answer))

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


@contextlib.contextmanager
def commands_in(folder: Path, commands: Mapping[str, Mapping[str, Any]]) -> Iterator[Commands]:
    """`Commands` whose process ends with the block."""
    made = Commands(folder, commands)
    try:
        yield made
    finally:
        made.close()


def run_commands(folder: Path, commands: Mapping[str, Mapping[str, Any]]) -> dict[str, Ended]:
    """Runs all of them now, one after the other."""
    with commands_in(folder, commands) as made:
        return dict(made)


def _run(program: str, flags: list[str], stdin: str = "") -> dict[str, object]:
    from qwen2_ascend.runtime import startup

    main = import_module(PROGRAMS[program]).main
    out, sys.stdin = io.StringIO(), io.StringIO(stdin)
    with contextlib.redirect_stdout(out), _written_to_stderr() as err:
        try:
            status = main(flags)
        except SystemExit as exit_:
            status = exit_.code
    if startup._current is not None:
        startup._current.close()  # a failed run leaves this to the end of its process
    err.seek(0)
    said = {"out": out.getvalue(), "err": err.read().decode()}
    return {"status": status, **said, "there": os.listdir()}


@contextlib.contextmanager
def _written_to_stderr() -> Iterator[IO[bytes]]:
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


def _serve() -> None:
    """Answers every line; what programs print past Python's buffers goes to stderr."""
    asked, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    for line in asked:
        print(json.dumps(_run(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
