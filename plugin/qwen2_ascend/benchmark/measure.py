"""Runs a command and measures it from outside: wall time, and anonymous memory at its peak."""

from __future__ import annotations

import statistics
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SAMPLE_SECONDS = 0.005


class Measured(NamedTuple):
    """One run of one command."""

    seconds: float
    peak_anonymous_bytes: int
    """Of the process itself; memory mapped from files does not count."""
    output: str
    """What it printed."""


def run_measured(command: Sequence[str], timeout_seconds: float = 3600) -> Measured:
    """Runs a command to its end.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = _PeakMemory(process.pid)
    with peak:
        output, _ = process.communicate(timeout=timeout_seconds)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise RuntimeError(f"{command[0]} failed with {process.returncode}: {output[-2000:]}")
    return Measured(seconds, peak.num_bytes, output)


class Spread(NamedTuple):
    """Several figures in short."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


class _PeakMemory:
    """Samples a process's RssAnon until left."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.num_bytes = 0

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            try:
                lines = self._status.read_text().splitlines()
            except OSError:
                return
            found = [int(line.split()[1]) for line in lines if line.startswith("RssAnon")]
            self.num_bytes = max(self.num_bytes, *(kib * 1024 for kib in found), 0)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
