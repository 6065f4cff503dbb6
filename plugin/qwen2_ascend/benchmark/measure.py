"""Runs a command and measures it from outside: wall time, and anonymous memory at its peak."""

from __future__ import annotations

import statistics
import subprocess
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

SAMPLE_SECONDS = 0.005


class Measured(NamedTuple):
    """One run of one command."""

    seconds: float
    peak_anonymous_bytes: int
    """The process's own memory; memory mapped from files does not count."""
    output: str
    """What it printed."""


def run_measured(command: Sequence[str]) -> Measured:
    """Runs a command to its end.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = PeakMemory(process.pid)
    with peak:
        output, _ = process.communicate(timeout=3600)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise RuntimeError(f"{command[0]} failed with {process.returncode}: {output[-2000:]}")
    return Measured(seconds, peak.num_bytes, output)


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """The median of several figures with the lowest and the highest, each as `form` says."""
    figures = (statistics.median(values), min(values), max(values))
    median, low, high = (format(value, form) for value in figures)
    return f"{median} ({low}-{high})"


def largest_difference(sides: Iterable[Sequence[float]]) -> float:
    """Largest relative difference of any side's numbers from the first side's; NaN is infinite."""
    first, *others = sides
    found = [abs(a - b) / abs(a) for other in others for a, b in zip(first, other, strict=True)]
    return max((x if x == x else float("inf") for x in found), default=0.0)


class PeakMemory:
    """Samples a process's anonymous memory from outside for the length of a `with` block."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.num_bytes = 0

    def sample(self) -> int:
        """Bytes that the process holds just now; 0 when it has gone."""
        try:
            lines = self._status.read_text().splitlines()
        except OSError:
            return 0
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.num_bytes = max(self.num_bytes, self.sample())

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
