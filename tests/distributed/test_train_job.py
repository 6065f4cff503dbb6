"""A whole torchrun job: being told to stop, losing a rank, and what is shown of an error."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distributed.jobs import LONGEST_SECONDS, ROOT, Job, torchrun
from helpers import make_tiny_hugging_face_folder

FLAGS = (
    "--mock-data --seq-length 16 --global-batch-size 4 --train-iters 100000 --lr 1e-4 "
    "--tensor-model-parallel-size 2 --device cpu --ckpt-format torch"
)

pytestmark = pytest.mark.distributed


@contextlib.contextmanager
def training(folder: Path, flags: str = "") -> Iterator[Job]:
    """Two tensor-parallel ranks that train until something happens to them."""
    hugging_face = make_tiny_hugging_face_folder(folder / "hf")
    script = [str(ROOT / "launch" / "pretrain_qwen2.py"), "--load", str(hugging_face)]
    script += ["--save", str(folder / "save"), *FLAGS.split(), *flags.split()]
    with torchrun(folder, script, "--standalone --nproc-per-node 2") as job:
        yield job


def test_sigterm_on_one_rank_saves_and_ends_all(tmp_path: Path) -> None:
    with training(tmp_path) as running:
        running.wait_for_iteration(2)
        os.kill(running.worker(1), signal.SIGTERM)
        assert running.process.wait(LONGEST_SECONDS) == 0, running.log[-3000:]
        last = running.iterations[-1]
        assert f"stopped after iteration {last}: was told to stop (SIGTERM)" in running.log
        tracker = tmp_path / "save" / "latest_checkpointed_iteration.txt"
        assert tracker.read_text(encoding="utf-8") == str(last)
        assert len(list((tmp_path / "save").glob(f"iter_{last:07d}/mp_rank_0*/*.pt"))) == 2
        assert running.log.count("saved ") == 1, "rank 0 alone speaks"


def test_a_killed_rank_takes_the_job_down(tmp_path: Path) -> None:
    with training(tmp_path) as running:
        running.wait_for_iteration(2)
        killed = running.worker(1)
        begun = time.monotonic()
        os.kill(killed, signal.SIGKILL)
        assert running.process.wait(60) != 0
        assert time.monotonic() - begun < 60
        root_cause = running.log.split("Root Cause")[-1]
        assert f"exitcode  : -9 (pid: {killed})" in root_cause, running.log[-3000:]


def test_torchrun_shows_the_first_error(tmp_path: Path) -> None:
    with training(tmp_path, "--lr 1e30 --lr-decay-style constant") as running:
        assert running.process.wait(LONGEST_SECONDS) != 0
        log = running.log
        assert log.count("error: iteration 2: loss ") == 1, log[-3000:]
        assert "NonFiniteError" in log.split("Root Cause")[-1]
