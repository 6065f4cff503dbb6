"""A checkpoint that one megatron-core has written is resumed with another, in both directions.

The other releases are those of the environments that are there: `.venv`, and what `make
test-compat` has built beside it. Each run is a user's own: the launch script, by torchrun where
there are two ranks.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.version import Version

from distributed.jobs import ROOT, read_metrics
from helpers import make_tiny_hugging_face_folder

TOLERANCE = 6e-7
"""Tolerance of fp32 losses after a resume at another layout; train_worker.py has the same."""
SAVED, STEPS = 2, 4
FLAGS = (
    "--mock-data --seq-length 16 --global-batch-size 4 --train-iters 4 --lr 3e-3 --device cpu "
    "--ckpt-format torch_dist"
)
TWO_STAGES = "--pipeline-model-parallel-size 2"
OWN = importlib.metadata.version("megatron-core")


def environments() -> dict[str, Path]:
    """The Python of each newer release that an environment of this repository has.

    Older ones have their own turn, in which this one is the newer.
    """
    found = {}
    for folder in (ROOT / ".venv", *sorted(ROOT.glob(".venv-compat-*"))):
        for info in folder.glob("lib/python3.*/site-packages/megatron_core-*.dist-info"):
            found[info.name.removesuffix(".dist-info").partition("-")[2]] = folder / "bin/python"
    own = Version(OWN)
    return {release: python for release, python in found.items() if Version(release) > own}


NEWER = environments()


class Written(NamedTuple):
    """What a release has saved after the first steps, and the losses of all of them."""

    folder: Path
    losses: dict[int, float]


@pytest.fixture(scope="module")
def written_by(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Written]:
    """Runs a release's two pipeline stages, once in a test run."""
    hugging_face = make_tiny_hugging_face_folder(tmp_path_factory.mktemp("hf"), tied=True)

    @functools.cache
    def write(release: str) -> Written:
        folder = tmp_path_factory.mktemp("written") / release
        torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2"
        train(release, torchrun, f"{TWO_STAGES} --save-interval {SAVED}", hugging_face, folder)
        (folder / "latest_checkpointed_iteration.txt").write_text(str(SAVED), encoding="utf-8")
        return Written(folder, losses_of(folder))

    return write


@pytest.mark.distributed
@pytest.mark.skipif(not NEWER, reason="no environment with a newer megatron-core is built")
@pytest.mark.parametrize("direction", ["to the newer", "to the older"])
@pytest.mark.parametrize("newer", sorted(NEWER))
def test_torch_dist_is_resumed_by_another_release(
    newer: str, direction: str, written_by: Callable[[str], Written], tmp_path: Path
) -> None:
    """One process resumes two pipeline stages; the run that goes on is the reference."""
    writer, reader = (OWN, newer) if direction == "to the newer" else (newer, OWN)
    written = written_by(writer)
    log = train(reader, "", "", written.folder, tmp_path)
    losses = losses_of(tmp_path)
    assert list(losses) == list(range(SAVED + 1, STEPS + 1)), log[-3000:]
    differences = [abs(loss - written.losses[at]) for at, loss in losses.items()]
    assert max(differences) <= TOLERANCE, f"{losses} instead of {written.losses}"


def losses_of(folder: Path) -> dict[int, float]:
    return {row["iteration"]: row["loss"] for row in read_metrics(folder)}


def train(release: str, launcher: str, flags: str, load: Path, save: Path) -> str:
    """Runs the launch script to its end, with the environment of a release; its log."""
    python = Path(sys.executable) if release == OWN else NEWER[release]
    command = [str(python), *launcher.split(), str(ROOT / "launch" / "pretrain_qwen2.py")]
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
