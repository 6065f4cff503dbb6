"""`python -m npusim.inside ROOT FOLDER`: runs FOLDER/groups.json's tests on simulated cards.

Importing torch_npu takes most of a test's time, so it is done once, and the ranks of one group
after the other are forked from here. Each rank of group N runs pytest, writes its reports to
FOLDER/N/reports.RANK.jsonl and prints into FOLDER/N/log.RANK.txt.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch_npu
from torch.distributed import TCPStore

GROUP_SECONDS = 1500
"""Time for all tests of a group."""
STRAGGLER_SECONDS = 60
"""Time for the other ranks once one has ended."""


class Recorder:
    """A pytest plugin that writes every report down."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: pytest.Config | None = None

    def pytest_configure(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        assert self.config is not None
        hook = self.config.hook.pytest_report_to_serializable
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(hook(config=self.config, report=report)) + "\n")


def main(root: str, folder: Path) -> int:
    """Runs every group; 0 if all ranks ended well."""
    os.chdir(root)
    # A time-out outside ends us by SIGTERM: as an exception, so that the ranks end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    assert not torch_npu.npu.is_initialized(), "a rank cannot be forked any more"
    groups = json.loads((folder / "groups.json").read_text(encoding="utf-8"))
    return max([_run_group(group, folder / str(n)) for n, group in enumerate(groups)])


def _run_group(group: dict, folder: Path) -> int:
    folder.mkdir()
    ranks: set[int] = set()
    # Kept here as torchrun keeps it: a rank that keeps it itself may, between two modules' tests,
    # end it under a rank that has already joined.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    try:
        for rank in range(group["cards"]):
            process = os.fork()
            if process == 0:
                _run_rank(group, rank, store.port, folder)
            ranks.add(process)
        return _wait(ranks, time.monotonic() + GROUP_SECONDS)
    finally:
        for process in ranks:
            os.kill(process, signal.SIGKILL)
        for process in ranks:
            os.waitpid(process, 0)


def _run_rank(group: dict, rank: int, port: int, folder: Path) -> None:
    """Never returns: the process ends here."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    log = os.open(folder / f"log.{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(  # as torchrun does
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(group["cards"]),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        NPUSIM_FOLDER=str(folder),
        HCCL_SIM_LOG=str(folder / "hccl"),
        TORCH_NPU_SIM_SOC=group["soc"],
    )
    status = 1
    try:
        options = ["-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
        options += ["--basetemp", str(folder / f"tmp.{rank}")]
        recorder = Recorder(folder / f"reports.{rank}.jsonl")
        status = int(pytest.main([*options, *group["tests"]], plugins=[recorder]))
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # torch_npu's and the streams' threads need not end for the reports to be complete.
    os._exit(status)


def _wait(ranks: set[int], deadline: float) -> int:
    """Reaps the ranks, until the deadline; leaves in `ranks` those that are left over."""
    worst = 0
    while ranks and time.monotonic() < deadline:
        for process in list(ranks):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                ranks.remove(process)
                worst = max(worst, os.waitstatus_to_exitcode(status) != 0)
                deadline = min(deadline, time.monotonic() + STRAGGLER_SECONDS)
        time.sleep(0.02)
    return 1 if ranks else worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
