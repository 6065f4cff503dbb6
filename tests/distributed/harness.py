"""Distributed checks: one launch per world size, many checks inside, each its own test.

The ranks of a launch are forks of a process that has imported torch, megatron-core and transformers
(fork_server.py). They are joined as torchrun joins its own: the same environment variables, a store
that outlives the ranks, a session for each of them, and the first that fails ends the others. What
differs: a module that was there already need not be imported by the code that uses it; and there
are two servers, so ranks 0 and 2 (1 and 3) walk a set of strings in the same order. Users' own
commands are therefore run by torchrun itself, in test_train_job.py and in other rooms.

A worker script registers its checks and hands over to `main`:

    CHECKS = Checks()

    @CHECKS.add(world_size=2)
    def loss_at_tp2(run: Run) -> str:
        ...                                  # every rank runs this; raise or assert to fail
        return "largest difference 1.2e-07"  # shown with the test's result

    if __name__ == "__main__":
        main(CHECKS)

Its test module imports the script (so nothing heavy at its top level) and has a test of each check:

    WORKER = Path(__file__).with_name("loss_worker.py")
    test_loss = each_check(WORKER, CHECKS)
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from commands import environment

if TYPE_CHECKING:
    from qwen2_ascend.runtime import Runtime

TIMEOUT_SECONDS = 560
"""Time for a whole launch."""
STALL_SECONDS = float(os.environ.get("CHECKS_STALL_SECONDS", "120"))
"""Time for a collective, and for the other ranks after one has finished a check."""
START_SECONDS = 120
"""Time for the imports of a fork server."""


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

    def case(self, name: str, world_size: int, function: Callable, *given, **named) -> None:
        """Registers a function for one of its cases; what it is given comes before the run."""
        self._checks.append(Check(name, world_size, functools.partial(function, *given, **named)))

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
    names = json.loads(os.environ["CHECKS_NAMES"])
    for check in checks.of(running.world_size):
        if names and check.name not in names:
            continue
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
    """Starts each worker once per world size, on demand, and remembers the results.

    Args:
        folder: where the launches' folders are made.
        wanted: names of the checks that this test run has by worker; None for all. A check that is
            not among them gets a launch of its own when it is asked for.
    """

    def __init__(self, folder: Path, wanted: Mapping[Path, Collection[str]] | None = None) -> None:
        self._folder = folder
        self._wanted = wanted
        self._results: dict[tuple[Path, int, str], dict[str, Result]] = {}

    def result(self, worker: Path, check: Check) -> Result:
        """The result of `check`, launching all wanted ones of its world size the first time."""
        names = [] if self._wanted is None else sorted(self._wanted.get(worker, ()))
        alone = self._wanted is not None and check.name not in names
        key = (worker, check.world_size, check.name if alone else "")
        if key not in self._results:
            folder = self._folder / "-".join(filter(None, (worker.stem, *map(str, key[1:]))))
            self._results[key] = launch(
                worker, check.world_size, folder, names=[check.name] if alone else names
            )
        results = self._results[key]
        return results.get(check.name) or Result(False, f"not reached. {results['launch'].detail}")


def each_check(worker: Path, checks: Checks) -> Callable[..., None]:
    """A test of every check of a worker script, for a module to keep as `test_...`."""
    import pytest

    @pytest.mark.distributed
    @pytest.mark.parametrize("check", checks.all(), ids=str)
    def test(check: Check, launches: Launches) -> None:
        launches.result(worker, check).require()

    return test


def launch(
    worker: Path,
    world_size: int,
    folder: Path,
    timeout: float = TIMEOUT_SECONDS,
    *,
    names: Sequence[str] = (),
) -> dict[str, Result]:
    """Runs all ranks to their end or the time-out; no process of them is left either way.

    Args:
        worker: the script.
        world_size: how many ranks run it.
        folder: the ranks' own.
        timeout: seconds.
        names: of the checks to run; none for all of the world size.

    Returns:
        A Result per check that at least one rank finished, and "launch" for the run itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    log.touch()
    servers = [_fork_server(number) for number in range(min(world_size, 2))]
    try:
        environments = _environments(world_size, folder, names)
        status = _run_ranks(servers, worker, environments, log, timeout)
    finally:
        for server in servers:
            server.end()
    tail = log.read_text(encoding="utf-8", errors="replace")[-4000:]
    results = dict(_gather(folder, world_size))
    results["launch"] = Result(status == GOOD, f"launch: {status}\n{tail}")
    return results


GOOD = "all ranks ended with exit status 0"


def _run_ranks(
    servers: list[ForkServer], worker: Path, environments: list[dict], log: Path, timeout: float
) -> str:
    """How a launch ended: at its first rank that failed, or with all of them."""
    port = servers[0].ask(store=True)["port"]
    deadline = time.monotonic() + timeout
    for number, server in enumerate(servers):
        own = [{**e, "MASTER_PORT": str(port)} for e in environments[number :: len(servers)]]
        server.tell(script=str(worker), log=str(log), environments=own)
    running = set(range(len(environments)))
    while running:
        left = deadline - time.monotonic()
        ready = select.select(servers, [], [], max(left, 0))[0]
        for server in ready:
            ended = server.hear()
            if ended["status"]:
                return f"rank {ended['rank']} ended with {_named(ended['status'])}"
            running.discard(ended["rank"])
        if not ready:
            return f"killed after {timeout} seconds, with rank(s) {sorted(running)} still running"
    return GOOD


def _named(status: int) -> str:
    return f"exit status {status}" if status > 0 else signal.Signals(-status).name


def _environments(world_size: int, folder: Path, names: Sequence[str]) -> list[dict[str, str]]:
    """What torchrun --standalone --nproc-per-node WORLD_SIZE gives each rank, but for the port."""
    shared = {
        **environment(),
        "CHECKS_FOLDER": str(folder),
        "CHECKS_NAMES": json.dumps(list(names)),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": folder.name,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    shared |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), str(world_size))
    return [
        {**shared, **dict.fromkeys(("RANK", "LOCAL_RANK", "ROLE_RANK"), str(rank))}
        for rank in range(world_size)
    ]


class ForkServer:
    """Starts fork_server.py and talks with it; it ends with this process at the latest."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the server
        script = Path(__file__).with_name("fork_server.py")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(script), str(theirs.fileno())],
                env=environment(),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,  # Ctrl-C is for pytest, which ends this one
            )
        atexit.register(self.close)

    def fileno(self) -> int:
        """What select waits for: readable when a rank has ended."""
        return self._channel.fileno()

    def tell(self, **order: object) -> None:
        with suppress(ConnectionError):  # `hear` says so
            self._channel.send(json.dumps(order).encode())

    def hear(self) -> dict[str, int]:
        """The next answer."""
        self._channel.settimeout(START_SECONDS)
        with suppress(TimeoutError, ConnectionError):
            if heard := self._channel.recv(1 << 20):
                return json.loads(heard)
        self._log.seek(0)
        told = self._log.read().decode(errors="replace")[-4000:]
        self.close()
        raise RuntimeError(f"fork_server.py does not answer:\n{told}")

    def ask(self, **order: object) -> dict[str, int]:
        self.tell(**order)
        return self.hear()

    def end(self) -> None:
        """Kills what is left of a launch."""
        if self._process.returncode is None:
            self.tell(end=True)
            while "ended" not in self.hear():
                pass

    def close(self) -> None:
        """Ends the server, which kills what is left below it."""
        self._channel.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        _SERVERS.pop(self._number, None)
        atexit.unregister(self.close)


_SERVERS: dict[int, ForkServer] = {}


def _fork_server(number: int) -> ForkServer:
    """A server that later launches use again. Each has its own seed of Python's hashes."""
    if number not in _SERVERS:
        _SERVERS[number] = ForkServer(number)
    return _SERVERS[number]


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
