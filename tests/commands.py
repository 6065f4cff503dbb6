"""Python programs that tests start: each in a process of its own, or many after one another in one.

`python commands.py COMMANDS.json RESULTS.json` is that one process. COMMANDS.json is a list of
{"program", "flags"}, with "stdin" where something is read there. RESULTS.json has for each the exit
status, what was written to stdout and stderr, and what is in the working folder then.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
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
    "align": "qwen2_ascend.alignment.align",
    "generate": "qwen2_ascend.inference.generate",
    "evaluate": "qwen2_ascend.evaluation.evaluate",
    "pretrain": "qwen2_ascend.training.pretrain",
    "finetune": "qwen2_ascend.finetuning.finetune",
    "qwen2-ascend": "qwen2_ascend.cli",
}


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
    seconds: float = 500,
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


def run_commands(folder: Path, commands: Mapping[str, Mapping[str, Any]]) -> dict[str, Ended]:
    """Runs command lines one after the other in a process of their own, in `folder`."""
    given, written = folder / "commands.json", folder / "results.json"
    given.write_text(json.dumps(list(commands.values())), encoding="utf-8")
    run_python(__file__, given, written, folder=folder)
    results = json.loads(written.read_text(encoding="utf-8"))
    return dict(zip(commands, (Ended(**result) for result in results), strict=True))


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


if __name__ == "__main__":
    given, written = map(Path, sys.argv[1:])  # a program may change sys.argv
    results = [_run(**command) for command in json.loads(given.read_text(encoding="utf-8"))]
    written.write_text(json.dumps(results), encoding="utf-8")
