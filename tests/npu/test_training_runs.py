"""Training on the cards as a user starts it, against the same command on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import make_tiny_hugging_face_folder

pytestmark = [pytest.mark.hardware, pytest.mark.timeout(1900)]

LAUNCH = Path(__file__).parents[2] / "launch" / "pretrain_qwen2.py"
FLAGS = "--mock-data --seq-length 32 --global-batch-size 8 --micro-batch-size 2 --train-iters 8 "
FLAGS += "--lr 1e-3 --no-mindspeed"
LAYOUTS = {
    "tp1-pp1": (1, ""),
    "tp2": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "tp2-pp2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "dp2": (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
}
TOLERANCES = {"": 1e-4, "--bf16": 3e-2}
"""Tolerances of a loss near 5.5 nats, in fp32 and bf16; guesses, since no card was measured."""

layouts = pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=pytest.mark.hardware(cards=cards))
        for name, (cards, _) in LAYOUTS.items()
    ],
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_hugging_face_folder(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def on_cpu(model: Path, tmp_path_factory: pytest.TempPathFactory):
    """The rows of the run on the CPU, by precision."""
    runs: dict[str, list[dict]] = {}

    def rows(precision: str) -> list[dict]:
        if precision not in runs:
            folder = tmp_path_factory.mktemp("cpu")
            runs[precision] = launch(1, f"{FLAGS} {precision} --device cpu", model, folder)
        return runs[precision]

    return rows


def launch(cards: int, flags: str, model: Path, folder: Path) -> list[dict]:
    """The metrics of a run on so many cards."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(cards), str(LAUNCH), *flags.split()]
    command += ["--load", str(model), "--report-dir", str(folder)]
    environ = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (done.stderr or done.stdout)[-3000:]
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@layouts
@pytest.mark.parametrize("precision", TOLERANCES, ids=["fp32", "bf16"])
def test_losses_are_those_of_the_cpu(
    precision, layout, model, on_cpu, tmp_path, figures, hardware
) -> None:
    cards, sizes = LAYOUTS[layout]
    found = launch(cards, f"{FLAGS} {precision} {sizes} --device {hardware.name}", model, tmp_path)
    pairs = list(zip(found, on_cpu(precision), strict=True))
    figures["loss difference"] = max(abs(a["loss"] - b["loss"]) for a, b in pairs)
    figures["grad norm difference"] = max(abs(a["grad_norm"] - b["grad_norm"]) for a, b in pairs)
    figures["seconds per step"] = found[-1]["step_seconds"]
    figures["peak MiB"] = found[-1]["peak_memory_bytes"] / 2**20
    assert len(found) == 8
    assert figures["loss difference"] <= TOLERANCES[precision]
    assert found[-1]["peak_memory_bytes"] > 0
    assert hardware.name == "cpu" or found[-1]["tflops_per_device"] > 0


@layouts
def test_deterministic_runs_end_with_the_same_bits(
    layout, model, tmp_path, figures, hardware
) -> None:
    cards, sizes = LAYOUTS[layout]
    flags = f"{FLAGS} {sizes} --bf16 --deterministic --device {hardware.name}"
    runs = [launch(cards, flags, model, tmp_path / name) for name in ("first", "second")]
    first, second = ([(row["loss"], row["grad_norm"]) for row in run] for run in runs)
    figures["steps that differ"] = sum(a != b for a, b in zip(first, second, strict=True))
    assert first == second
