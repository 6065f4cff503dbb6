"""Jobs of torchrun's as a user starts them, to which something happens.

Every process of a job is known by a mark in its environment, so that none is left behind and every
one can be counted, whoever its parent is by then.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
LONGEST_SECONDS = 120
MARK = "CHECKS_FOLDER"


class Job(NamedTuple):
    """One torchrun for each node, all on this machine."""

    processes: list[subprocess.Popen]
    folder: Path

    @property
    def process(self) -> subprocess.Popen:
        return self.processes[0]

    @property
    def log(self) -> str:
        """What all nodes have printed, one after the other."""
        return "".join(self.log_of(node) for node in range(len(self.processes)))

    def log_of(self, node: int) -> str:
        return (self.folder / f"log.{node}").read_text(encoding="utf-8", errors="replace")

    @property
    def iterations(self) -> list[int]:
        return [row["iteration"] for row in read_metrics(self.folder / "save")]

    def running(self) -> dict[int, int | None]:
        """The job's processes: the ranks that they or their parents are by their ids."""
        mark, found = f"{MARK}={self.folder}".encode(), {}
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                words = environ.read_bytes().split(b"\0")
                if mark in words and _runs(environ.parent):
                    ranks = [int(word[5:]) for word in words if word.startswith(b"RANK=")]
                    found[int(environ.parent.name)] = ranks[0] if ranks else None
        return dict(sorted(found.items()))

    def ranks(self) -> list[int]:
        """The ids of the ranks, and of what they have started."""
        return [pid for pid, rank in self.running().items() if rank is not None]

    def worker(self, rank: int) -> int:
        """The process id of one rank."""
        found = [pid for pid, of in self.running().items() if of == rank]
        assert found, f"rank {rank} is not running:\n{self.log[-3000:]}"
        return found[0]

    def wait_until(self, happened: Callable[[], object], seconds: float = LONGEST_SECONDS) -> float:
        """How long it took."""
        begun = time.monotonic()
        while not happened():
            assert time.monotonic() - begun < seconds, self.log[-3000:]
            time.sleep(0.05)
        return time.monotonic() - begun

    def wait_for_iteration(self, iteration: int) -> None:
        def reached() -> bool:
            assert self.process.poll() is None, self.log[-3000:]
            return bool(self.iterations) and self.iterations[-1] >= iteration

        self.wait_until(reached)

    def wait_for_text(self, text: str) -> None:
        def said() -> bool:
            assert text in self.log or self.process.poll() is None, self.log[-3000:]
            return text in self.log

        self.wait_until(said)

    def wait(self, seconds: float = LONGEST_SECONDS) -> list[int]:
        """The exit statuses of all torchruns."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(subprocess.TimeoutExpired):
            return [process.wait(deadline - time.monotonic()) for process in self.processes]
        raise AssertionError(f"not ended after {seconds} s:\n{self.log[-3000:]}")


@contextlib.contextmanager
def torchrun(
    folder: Path,
    script: Sequence[str],
    *nodes: str,
    prefixes: Sequence[Sequence[str]] = (),
) -> Iterator[Job]:
    """Starts a script's ranks, and kills what is left of them in the end.

    Args:
        folder: for the logs; marks the processes.
        script: with its flags.
        nodes: the options of each node's torchrun.
        prefixes: of each node's command.
    """
    folder.mkdir(parents=True, exist_ok=True)
    variables = {**os.environ, "OMP_NUM_THREADS": "1", MARK: str(folder)}
    paths = (ROOT / "plugin", ROOT / "tests")
    variables["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    job = Job([], folder)
    try:
        for node, options in enumerate(nodes):
            command = [*prefixes[node]] if prefixes else []
            command += [sys.executable, "-m", "torch.distributed.run", *options.split(), *script]
            with (folder / f"log.{node}").open("w", encoding="utf-8") as log:
                job.processes.append(
                    subprocess.Popen(
                        command,
                        env=variables,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        stdin=subprocess.DEVNULL,
                    )
                )
        yield job
    finally:
        for pid in job.running():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        for process in job.processes:
            process.wait()


def read_metrics(folder: Path) -> list[dict]:
    """The steps in a run's metrics.jsonl."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        return []
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").split("\n")[:-1]]
    return [row for row in rows if "iteration" in row]


def _runs(process: Path) -> bool:
    """Whether it is more than an ended process that nobody has waited for."""
    return process.joinpath("stat").read_text().rpartition(")")[2].split()[0] != "Z"
