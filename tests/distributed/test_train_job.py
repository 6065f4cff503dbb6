"""A whole torchrun job: being told to stop, losing a rank, and what is shown of an error."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from helpers import make_tiny_hugging_face_folder

ROOT = Path(__file__).parents[2]
FLAGS = (
    "--mock-data --seq-length 16 --global-batch-size 4 --train-iters 100000 --lr 1e-4 "
    "--tensor-model-parallel-size 2 --device cpu --ckpt-format torch"
)
LONGEST_SECONDS = 120

pytestmark = pytest.mark.distributed


class Job(NamedTuple):
    process: subprocess.Popen
    folder: Path

    @property
    def log(self) -> str:
        return (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace")

    @property
    def iterations(self) -> list[int]:
        metrics = self.folder / "save" / "metrics.jsonl"
        if not metrics.is_file():
            return []
        lines = metrics.read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line)["iteration"] for line in lines]

    def worker(self, rank: int) -> int:
        """The process id of one rank."""
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                words = environ.read_bytes().split(b"\0")
                if {f"CHECKS_FOLDER={self.folder}".encode(), f"RANK={rank}".encode()} <= {*words}:
                    return int(environ.parent.name)
        raise AssertionError(f"rank {rank} is not running:\n{self.log[-3000:]}")

    def wait_for_iteration(self, iteration: int) -> None:
        deadline = time.monotonic() + LONGEST_SECONDS
        while not self.iterations or self.iterations[-1] < iteration:
            assert self.process.poll() is None, self.log[-3000:]
            assert time.monotonic() < deadline, self.log[-3000:]
            time.sleep(0.1)


@contextlib.contextmanager
def job(folder: Path, flags: str = "") -> Iterator[Job]:
    """Two tensor-parallel ranks that train until something happens to them."""
    hugging_face = make_tiny_hugging_face_folder(folder / "hf")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "launch" / "pretrain_qwen2.py"), "--load", str(hugging_face)]
    command += ["--save", str(folder / "save"), *FLAGS.split(), *flags.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CHECKS_FOLDER": str(folder)}
    environment["PYTHONPATH"] = str(ROOT / "plugin")
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield Job(process, folder)
    finally:
        kill_marked(folder)
        process.wait()


def kill_marked(folder: Path) -> None:
    """Kills every process of one job: torchrun's workers have sessions of their own."""
    mark = f"CHECKS_FOLDER={folder}".encode()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in environ.read_bytes().split(b"\0"):
                os.kill(int(environ.parent.name), signal.SIGKILL)


def test_sigterm_on_one_rank_saves_and_ends_all(tmp_path: Path) -> None:
    with job(tmp_path) as running:
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
    with job(tmp_path) as running:
        running.wait_for_iteration(2)
        killed = running.worker(1)
        begun = time.monotonic()
        os.kill(killed, signal.SIGKILL)
        assert running.process.wait(60) != 0
        assert time.monotonic() - begun < 60
        root_cause = running.log.split("Root Cause")[-1]
        assert f"exitcode  : -9 (pid: {killed})" in root_cause, running.log[-3000:]


def test_torchrun_shows_the_first_error(tmp_path: Path) -> None:
    with job(tmp_path, "--lr 1e30 --lr-decay-style constant") as running:
        assert running.process.wait(LONGEST_SECONDS) != 0
        log = running.log
        assert log.count("error: iteration 2: loss ") == 1, log[-3000:]
        assert "NonFiniteError" in log.split("Root Cause")[-1]
