"""A checkpoint that one megatron-core has written is resumed with another, in both directions.

The other release is `.venv`'s, and each older one whose environment `make test-compat` has built
before. So `make test-compat` runs every pair of the oldest, the pinned and the newest release. Each
run is a user's own: the launch script, by torchrun where there are two ranks.
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
    """The Python of `.venv`'s release and of each older one that has an environment here.

    With a newer one the pair has its turn there.
    """
    found = {}
    for folder in (ROOT / ".venv", *sorted(ROOT.glob(".venv-compat-*"))):
        for info in folder.glob("lib/python3.*/site-packages/megatron_core-*.dist-info"):
            release = info.name.removesuffix(".dist-info").partition("-")[2]
            if folder.name == ".venv" or Version(release) < Version(OWN):
                found[release] = folder / "bin/python"
    return {release: python for release, python in found.items() if release != OWN}


OTHERS = environments()


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
@pytest.mark.skipif(not OTHERS, reason="no environment with an older megatron-core is built")
@pytest.mark.parametrize("direction", ["to the other", "from the other"])
@pytest.mark.parametrize("other", sorted(OTHERS))
def test_torch_dist_is_resumed_by_another_release(
    other: str, direction: str, written_by: Callable[[str], Written], tmp_path: Path
) -> None:
    """One process resumes two pipeline stages; the run that goes on is the reference."""
    writer, reader = (OWN, other) if direction == "to the other" else (other, OWN)
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
    python = Path(sys.executable) if release == OWN else OTHERS[release]
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
