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


def measure(folder: Path) -> dict[str, float]:
    """Seconds and bytes of a board that is started and opened."""
    command = [sys.executable, "-m", "qwen2_ascend.cli", "board", str(folder), "--port", "0"]
    begin = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as board:
        try:
            assert board.stdout is not None
            url = board.stdout.readline().strip()
            return _measured(url, psutil.Process(board.pid), begin)
        finally:
            board.terminate()


def _measured(url: str, board: psutil.Process, begin: float) -> dict[str, float]:
    found: dict[str, float] = {"start_seconds": time.monotonic() - begin}
    names = [run["name"] for run in _timed(found, "list", url, "runs")["runs"]]
    _timed(found, "first", url, "curves", runs=names[:FIRST_SHOWN], series=SERIES)
    found["open_cpu_seconds"] = sum(board.cpu_times()[:2])
    _timed(found, "all", url, "curves", runs=names, series=SERIES)
    found["bytes_after_all_sampled"] = board.memory_info().rss
    begin = time.monotonic()
    while True:
        curves = _ask(url, "curves", runs=names, series=["loss"])["runs"].values()
        found["bytes"] = max(found.get("bytes", 0), board.memory_info().rss)
        if not any(one["is_sampled"] for one in curves):
            found["read_seconds"] = time.monotonic() - begin
            return found
        time.sleep(1)


def _timed(found: dict[str, float], name: str, url: str, question: str, **form: Any) -> Any:
    begin = time.monotonic()
    answer = _ask(url, question, **form)
    found[f"{name}_seconds"] = time.monotonic() - begin
    return answer


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
    for name, value in measure(Path(folder)).items():
        is_bytes = "bytes" in name
        print(
            f"{name.replace('bytes', 'megabytes') if is_bytes else name:<28}"
            f"{value / 1e6 if is_bytes else value:8.2f}"
        )


if __name__ == "__main__":
    main()
