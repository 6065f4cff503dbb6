"""Distributed checks: one torchrun per world size, many checks inside, each its own test.

A worker script registers its checks and hands over to `main`:

    CHECKS = Checks()

    @CHECKS.add(world_size=2)
    def loss_at_tp2(run: Run) -> str:
        ...                                  # every rank runs this; raise or assert to fail
        return "largest difference 1.2e-07"  # shown with the test's result

    if __name__ == "__main__":
        main(CHECKS)

Its test module imports the script (so nothing heavy at its top level) and parametrizes over it:

    @pytest.mark.parametrize("check", CHECKS.all())
    def test_loss(check, launches):
        launches.result(WORKER, check).require()
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from qwen2_ascend.runtime import Runtime

TIMEOUT_SECONDS = 280
"""For a whole torchrun."""
STALL_SECONDS = float(os.environ.get("CHECKS_STALL_SECONDS", "60"))
"""For a collective, and for the other ranks after one has finished a check."""


@dataclass(frozen=True)
class Run:
    """What a check gets: the started runtime and a folder that all ranks of the launch share."""

    runtime: Runtime
    folder: Path


class Check(NamedTuple):
    """One function to run on every rank of a launch."""

    name: str
    world_size: int
    function: Callable[[Run], str | None]

    def __str__(self) -> str:
        return self.name


@dataclass
class Checks:
    """A worker script's checks, in the order they were added."""

    _checks: list[Check] = field(default_factory=list)

    def add(self, *, world_size: int, name: str | None = None):
        """Decorator: registers a function under its own name or `name`."""

        def register(function: Callable[[Run], str | None]):
            self._checks.append(Check(name or function.__name__, world_size, function))
            return function

        return register

    def all(self) -> list[Check]:
        return list(self._checks)

    def of(self, world_size: int) -> list[Check]:
        return [check for check in self._checks if check.world_size == world_size]


@dataclass(frozen=True)
class Result:
    """How one check ended, over all ranks."""

    ok: bool
    detail: str

    def require(self) -> None:
        """Fails the test that asks, with every failing rank's traceback."""
        print(self.detail)
        assert self.ok, self.detail


# --- inside the worker ---------------------------------------------------------------------------


def main(checks: Checks) -> None:
    """Runs this world size's checks; every rank writes `results.RANK.json` after each of them."""
    from qwen2_ascend import runtime

    running = runtime.start("cpu", timeout_seconds=STALL_SECONDS)
    folder = Path(os.environ["CHECKS_FOLDER"])
    results: dict[str, dict[str, object]] = {}
    for check in checks.of(running.world_size):
        results[check.name] = _run(check, Run(running, folder))
        path = folder / f"results.{running.rank}.json"
        path.write_text(json.dumps(results), encoding="utf-8")
        _wait_for_others(running, check.name)
        runtime.destroy_model_parallel()
    running.close()


def _run(check: Check, run: Run) -> dict[str, object]:
    start = time.monotonic()
    try:
        detail = check.function(run) or ""
    except Exception:
        return {"ok": False, "detail": f"rank {run.runtime.rank}: {traceback.format_exc()}"}
    return {"ok": True, "detail": f"{detail} ({time.monotonic() - start:.1f} s)"}


def _wait_for_others(running: Runtime, name: str) -> None:
    """Ends this rank when another one does not come out of the check: it hangs in a collective."""
    import torch

    store = torch.distributed.distributed_c10d._get_default_store()
    store.set(f"done/{name}/{running.rank}", "1")
    store.wait(
        [f"done/{name}/{rank}" for rank in range(running.world_size)],
        timedelta(seconds=STALL_SECONDS),
    )


# --- outside, in pytest --------------------------------------------------------------------------


class Launches:
    """Starts each worker once per world size, on demand, and remembers the results."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._results: dict[tuple[Path, int], dict[str, Result]] = {}

    def result(self, worker: Path, check: Check) -> Result:
        """The result of `check`, launching all of its world size's checks the first time."""
        key = (worker, check.world_size)
        if key not in self._results:
            folder = self._folder / f"{worker.stem}-{check.world_size}"
            self._results[key] = launch(worker, check.world_size, folder)
        results = self._results[key]
        return results.get(check.name) or Result(False, f"not reached. {results['launch'].detail}")


def launch(
    worker: Path, world_size: int, folder: Path, timeout: float = TIMEOUT_SECONDS
) -> dict[str, Result]:
    """Runs one torchrun to its end or its time-out; no process of it is left either way.

    Returns:
        A Result per check that at least one rank finished, and "launch" for the run itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(world_size), str(worker)]
    tests = Path(__file__).parents[1]
    paths = [str(tests), str(tests.parent / "plugin"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "CHECKS_FOLDER": str(folder),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    with (folder / "log.txt").open("w+", encoding="utf-8", errors="replace") as log:
        status = _run_group(command, environment, log, timeout)
        log.seek(0)
        tail = log.read()[-4000:]
    results = dict(_gather(folder, world_size))
    results["launch"] = Result(status == "exit status 0", f"torchrun: {status}\n{tail}")
    return results


def _run_group(command: list[str], environment: dict[str, str], log, timeout: float) -> str:
    """Runs torchrun; says how it ended. Nothing of it is left running."""
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        return f"exit status {process.wait(timeout)}"
    except subprocess.TimeoutExpired:
        return f"killed after {timeout} seconds"
    finally:
        _kill_marked(environment["CHECKS_FOLDER"])
        process.wait()


def _kill_marked(folder: str) -> None:
    """Kills every process of one launch: torchrun's workers have sessions of their own."""
    mark = f"CHECKS_FOLDER={folder}".encode()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        pid = int(environ.parent.name)
        try:
            if pid != os.getpid() and mark in environ.read_bytes().split(b"\0"):
                os.kill(pid, signal.SIGKILL)
        except OSError:
            continue


def _gather(folder: Path, world_size: int) -> Iterator[tuple[str, Result]]:
    """One Result per check from the ranks' files; good only if every rank says so."""
    ranks = []
    for rank in range(world_size):
        path = folder / f"results.{rank}.json"
        ranks.append(json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})
    for name in dict.fromkeys(name for results in ranks for name in results):
        found = [results.get(name) for results in ranks]
        failed = [result["detail"] for result in found if result and not result["ok"]]
        absent = [rank for rank, result in enumerate(found) if result is None]
        if absent:
            failed.append(f"rank(s) {absent} never finished this check")
        yield name, Result(not failed, "\n".join(failed) or str(found[0]["detail"]))
