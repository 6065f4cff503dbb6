"""A run that was told to stop: the board says whether it saved, was too young to, or failed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from qwen2_ascend.board.job import Jobs, Order

LAUNCHER = """
import subprocess, sys
sys.exit(1 if subprocess.run([sys.executable, "-c", sys.argv[1]]).returncode else 0)
"""
"""It has one rank, and ends with 1 where that ends otherwise than with 0, as torchrun does."""
SLEEPS = "print('ready', flush=True); import time; time.sleep(60)"
CATCHES = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit({status})); "
RANKS = {
    "stopped_early": SLEEPS,
    "stopped": CATCHES.format(status=0) + SLEEPS,
    "failed": CATCHES.format(status=3) + SLEEPS,
}


@pytest.mark.parametrize("state", RANKS)
def test_a_run_that_is_told_to_stop(state: str, tmp_path: Path, monkeypatch) -> None:
    argv = [sys.executable, "-c", LAUNCHER, RANKS[state]]
    monkeypatch.setattr(Order, "argv", property(lambda order: argv))
    jobs = Jobs()
    jobs.start(Order(words=("torchrun",), save=tmp_path / "run"))
    wait_for(lambda: "ready" in (tmp_path / "run" / "run.log").read_text())
    jobs.stop()
    wait_for(lambda: jobs.state()["state"] != "stopping")
    assert jobs.state()["state"] == state


def test_a_second_stop_does_not_excuse_a_run_that_could_save(tmp_path: Path, monkeypatch) -> None:
    """A rank that was told to stop lets the next SIGTERM end it, and did not catch it then."""
    rank = (
        "import signal\n"
        "def told(*_):\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_DFL)\n"
        "    print('saves', flush=True)\n"
        f"signal.signal(signal.SIGTERM, told)\n{SLEEPS}"
    )
    argv = [sys.executable, "-c", LAUNCHER, rank]
    monkeypatch.setattr(Order, "argv", property(lambda order: argv))
    jobs = Jobs()
    jobs.start(Order(words=("torchrun",), save=tmp_path / "run"))
    for word in ("ready", "saves"):
        wait_for(lambda: word in (tmp_path / "run" / "run.log").read_text())  # noqa: B023
        jobs.stop()
    wait_for(lambda: jobs.state()["state"] != "stopping")
    assert jobs.state()["state"] == "failed"


def wait_for(condition) -> None:
    ends = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)
