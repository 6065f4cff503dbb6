"""Alignment, speed, memory and energy on the device; figures for the report, few of them limits.

The model is Qwen2.5-0.5B with random weights, or the Hugging Face folder that HARDWARE_MODEL names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

from helpers import make_tiny_hugging_face_folder
from npu.hardware import Hardware

pytestmark = [pytest.mark.hardware, pytest.mark.timeout(1900)]

ROOT = Path(__file__).parents[2]
MODEL = "HARDWARE_MODEL"


def run(*command: str, timeout: float = 1800) -> str:
    """What a Python program prints; fails with its last words."""
    paths = [str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environ = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = subprocess.run(
        [sys.executable, *command], env=environ, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def real_model() -> list[str]:
    """Flags for the model of HARDWARE_MODEL, where it is set."""
    return ["--load", os.environ[MODEL]] if MODEL in os.environ else []


# --- alignment ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_hugging_face_folder(tmp_path_factory.mktemp("model") / "hf")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_sublayer_is_aligned_with_a_dump_of_the_cpu(
    precision: str, tiny: Path, tmp_path: Path, hardware: Hardware, figures: dict
) -> None:
    """The command itself judges: transformers, and the CPU's run, whose tokens it takes."""
    align = [str(ROOT / "launch" / "align_qwen2.py"), "--load", str(tiny), "--seq-length", "32"]
    align += ["--precision", precision, "--no-mindspeed"]
    run(*align, "--device", "cpu", "--dump", str(tmp_path / "cpu"), "--dump-only")
    report = tmp_path / "report.json"
    of_device = ["--device", hardware.name, "--json", str(report)]
    told = run(*align, *of_device, "--compare-with", str(tmp_path / "cpu"))
    assert "The run compared with: ALIGNED" in told and "PARTED" not in told
    figures["told"] = told.strip().splitlines()[-1][:120]
    assert json.loads(report.read_text(encoding="utf-8"))


# --- speed, memory, energy ------------------------------------------------------------------------


def test_training(tmp_path: Path, hardware: Hardware, figures: dict) -> None:
    """The launcher's own log in bf16: tokens per second, peak memory, joules per token."""
    sizes = hardware.sizes.train.split()
    model = real_model()
    if model:
        sizes = [x for x in sizes if x not in ("--config", "0.5B")]
    elif "--config" not in sizes:
        model = ["--load", str(make_tiny_hugging_face_folder(tmp_path / "hf"))]
    run(
        *(str(ROOT / "launch" / "pretrain_qwen2.py"), "--mock-data", *sizes, *model),
        *("--train-iters", "12", "--lr", "1e-5", "--bf16", "--no-mindspeed"),
        *("--device", hardware.name, "--report-dir", str(tmp_path)),
    )
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    last = rows[-1]
    figures["tokens per second"] = median(row["tokens_per_second"] for row in rows[2:])
    figures["peak GiB"] = last["peak_memory_bytes"] / 2**30
    for name in ("tflops_per_device", "joules_per_token", "watts"):
        figures |= {name: last[name]} if last.get(name) is not None else {}
    assert len(rows) == 12 and all(row["loss"] < 13 for row in rows)  # ln(151936) is 11.9
    assert figures["peak GiB"] > 0


@pytest.mark.parametrize("command", ["train", "attention"])
def test_benchmark(command: str, tmp_path: Path, hardware: Hardware, figures: dict) -> None:
    """The benchmark of the project in bf16, which fails where the sides do not compute the same."""
    out = tmp_path / "figures.json"
    own = {"train": hardware.sizes.train, "attention": f"--seq-lengths {hardware.sizes.lengths}"}
    flags = own[command].split()
    if command == "train" and real_model():
        flags = [*(x for x in flags if x not in ("--config", "0.5B")), *real_model()]
    run(
        *(str(ROOT / "tools" / "benchmark.py"), command, "--device", hardware.name),
        *(*flags, *hardware.sizes.steps.split(), "--dtypes", "bf16", "--json", str(out)),
    )
    for row in json.loads(out.read_text(encoding="utf-8")):
        for side, found in row["sides"].items():
            name = f"{side} {row['seq_length']}" if command == "attention" else side
            figures[f"{name}: TFLOP/s"] = median(found["tflops_per_second"])
            figures[f"{name}: peak GiB"] = found["peak_memory_bytes"] / 2**30
            if found.get("joules_per_token"):
                figures[f"{name}: J/token"] = median(found["joules_per_token"])
    assert figures


def test_generation(tmp_path: Path, hardware: Hardware, figures: dict) -> None:
    """Greedy tokens in bf16 of eight prompts, and the device's speed."""
    sizes = hardware.sizes
    folder = os.environ.get(MODEL) or str(tmp_path / "hf")
    if MODEL not in os.environ:
        run("-m", "npu.generation", "make", folder, str(sizes.layers or ""))
    told = run("-m", "npu.generation", "run", folder, hardware.name, str(sizes.new_tokens))
    found = json.loads(told.splitlines()[-1])
    assert [len(tokens) for tokens in found["tokens"]] == [sizes.new_tokens] * 8
    figures["tokens per second"] = found["tokens_per_second"]
    figures["peak GiB"] = found["peak_memory_bytes"] / 2**30
