"""How fast a folder of many long runs opens, and in how much memory.

    python -m qwen2_ascend.board.benchmark FOLDER [RUNS STEPS]

makes FOLDER with that many runs (200 of 100,000 steps by default, about 6 GB; one that is there is
used again), starts `qwen2-ascend board` on it, and asks it what its page asks when it is opened.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

SERIES = ["loss", "validation_loss", "grad_norm", "lr", "tokens_per_second", "mfu"]
SERIES += ["peak_memory_bytes", "joules_per_token"]
FIRST_SHOWN = 6
"""Runs that a page shows when it is opened (static/runs.js)."""


def make_folder(folder: Path, num_runs: int, steps: int) -> None:
    """Writes runs as training writes them; most are copies of the first four."""
    for number in range(num_runs):
        path = folder / f"run-{number:03d}" / "metrics.jsonl"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if number >= 4:
            shutil.copyfile(folder / f"run-{number % 4:03d}" / "metrics.jsonl", path)
            continue
        with path.open("w") as out:
            draw = random.Random(number)
            for iteration in range(1, steps + 1):
                out.write(json.dumps(_row(iteration, steps, draw)) + "\n")


def _row(iteration: int, steps: int, draw: random.Random) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "consumed_samples": iteration * 256,
        "loss": 1.5 + 7 / (1 + iteration / 5000) + draw.gauss(0, 0.05),
        "grad_norm": abs(draw.gauss(1, 0.2)),
        "lr": 1e-4 * (1 - iteration / steps),
        "tokens_per_second": draw.gauss(400_000, 9000),
        "step_seconds": draw.gauss(2.6, 0.05),
        "tflops_per_device": draw.gauss(150, 3),
        "peak_memory_bytes": 54_221_495_808,
        "loss_scale": 1.0,
        "skipped": 0,
    }


def measure(folder: Path) -> Iterator[tuple[str, float, str]]:
    """Figures of a board that is started and opened, each as (what, how much, unit).

    Seconds are the clock's; CPU seconds are the board's own, which other work on the machine does
    not change.
    """
    command = [sys.executable, "-m", "qwen2_ascend.cli", "board", str(folder), "--port", "0"]
    begin = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as board:
        try:
            assert board.stdout is not None
            url = board.stdout.readline().strip()
            yield from _measured(url, psutil.Process(board.pid), begin)
        finally:
            board.terminate()


def _measured(url: str, board: psutil.Process, begin: float) -> Iterator[tuple[str, float, str]]:
    _ask(url, "state")
    yield "started", time.monotonic() - begin, "s"
    yield "started", _cpu(board), "CPU s"
    yield "memory of an empty page", board.memory_info().rss / 1e6, "MB"
    names = [run["name"] for run in _ask(url, "runs")["runs"]]
    _ask(url, "curves", runs=names[:FIRST_SHOWN], series=SERIES)
    yield "opened: the list and the newest six runs", time.monotonic() - begin, "s"
    yield "opened: the list and the newest six runs", _cpu(board), "CPU s"
    before, begin = _cpu(board), time.monotonic()
    _ask(url, "curves", runs=names, series=SERIES)
    yield "all runs in one picture, from then on", time.monotonic() - begin, "s"
    yield "all runs in one picture, from then on", _cpu(board) - before, "CPU s"
    yield "memory then", board.memory_info().rss / 1e6, "MB"
    most = 0
    while any(
        x["is_sampled"] for x in _ask(url, "curves", runs=names, series=["loss"])["runs"].values()
    ):
        most = max(most, board.memory_info().rss)
        time.sleep(5)
    yield "every row read in the background, from then on", time.monotonic() - begin, "s"
    yield "every row read in the background, from then on", _cpu(board) - before, "CPU s"
    yield "memory at most", most / 1e6, "MB"


def _cpu(board: psutil.Process) -> float:
    return sum(board.cpu_times()[:2])


def _ask(url: str, question: str, **form: Any) -> Any:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}api/{question}", json.dumps(form).encode(), headers)
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.loads(answer.read())


def main() -> None:
    """Prints the figures."""
    folder, *numbers = sys.argv[1:]
    num_runs, steps = map(int, numbers) if numbers else (200, 100_000)
    make_folder(Path(folder), num_runs, steps)
    for what, value, unit in measure(Path(folder)):
        print(f"{what:<50}{value:8.2f} {unit}", flush=True)


if __name__ == "__main__":
    main()
