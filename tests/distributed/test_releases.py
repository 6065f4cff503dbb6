"""A checkpoint that one megatron-core has written is resumed with another, in both directions.

The other releases are those of the environments that are there: `.venv`, and what `make
test-compat` has built beside it. Each run is a user's own: torchrun and the launcher.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distributed.jobs import ROOT, read_metrics
from helpers import make_tiny_hugging_face_folder

TOLERANCE = 6e-7
"""Of fp32 losses after a resume at another layout; train_worker.py has the same."""
SAVED, STEPS = 2, 4
FLAGS = (
    "--mock-data --seq-length 16 --global-batch-size 4 --train-iters 4 --lr 3e-3 --device cpu "
    "--ckpt-format torch_dist"
)
TWO_RANKS = "--pipeline-model-parallel-size 2"
OWN = importlib.metadata.version("megatron-core")


def environments() -> dict[str, Path]:
    """The Python of each other release that an environment of this repository has."""
    found = {}
    for folder in (ROOT / ".venv", *sorted(ROOT.glob(".venv-compat-*"))):
        for info in folder.glob("lib/python3.*/site-packages/megatron_core-*.dist-info"):
            found[info.name.removesuffix(".dist-info").partition("-")[2]] = folder / "bin/python"
    return {release: python for release, python in found.items() if release != OWN}


OTHERS = environments()


@pytest.mark.distributed
@pytest.mark.skipif(not OTHERS, reason="no environment with another megatron-core is built")
@pytest.mark.parametrize("other", sorted(OTHERS))
@pytest.mark.parametrize("written", ["by the other release", "here"])
def test_torch_dist_is_resumed_by_another_release(written: str, other: str, tmp_path: Path) -> None:
    """From two pipeline stages to one process; the run that goes on is the reference."""
    here, there = Path(sys.executable), OTHERS[other]
    writer, reader = (there, here) if written != "here" else (here, there)
    hugging_face = make_tiny_hugging_face_folder(tmp_path / "hf", tied=True)
    saved, resumed = tmp_path / "saved", tmp_path / "resumed"
    train(writer, 2, f"{TWO_RANKS} --save-interval {SAVED}", hugging_face, saved)
    (saved / "latest_checkpointed_iteration.txt").write_text(str(SAVED), encoding="utf-8")
    log = train(reader, 1, "", saved, resumed)
    expected = {row["iteration"]: row["loss"] for row in read_metrics(saved)}
    losses = {row["iteration"]: row["loss"] for row in read_metrics(resumed)}
    assert list(losses) == list(range(SAVED + 1, STEPS + 1)), log[-3000:]
    differences = [abs(losses[iteration] - expected[iteration]) for iteration in losses]
    assert max(differences) <= TOLERANCE, f"{losses} instead of {expected}"


def train(python: Path, ranks: int, flags: str, load: Path, save: Path) -> str:
    """Runs the launcher to its end, with another environment's packages; its log."""
    command = [str(python), "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), str(ROOT / "launch" / "pretrain_qwen2.py")]
    command += ["--load", str(load), "--save", str(save), *FLAGS.split(), *flags.split()]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "plugin")},
        capture_output=True,
        text=True,
        timeout=280,
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-3000:]
    return log
