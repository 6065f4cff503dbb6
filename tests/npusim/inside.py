"""`python -m npusim.inside ROOT FOLDER`: runs FOLDER/groups.json's tests on simulated cards.

Importing torch_npu takes most of a test's time, so it is done once, and the ranks of one group
after the other are forked from here. Each rank runs pytest and appends its reports to
FOLDER/reports.RANK.jsonl.
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

GROUP_SECONDS = 600
"""For all tests of a group."""
STRAGGLER_SECONDS = 60
"""For the other ranks once one has ended."""


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
    """Runs every group; 0 if all ranks ended by themselves."""
    os.chdir(root)
    assert not torch_npu.npu.is_initialized(), "a rank cannot be forked any more"
    groups = json.loads((folder / "groups.json").read_text(encoding="utf-8"))
    return max([_run_group(group, folder / str(n), folder) for n, group in enumerate(groups)])


def _run_group(group: dict, rendezvous: Path, folder: Path) -> int:
    ranks = {}
    for rank in range(group["cards"]):
        process = os.fork()
        if process == 0:
            _run_rank(group, rank, rendezvous, folder)
        ranks[process] = rank
    return _wait(ranks, time.monotonic() + GROUP_SECONDS)


def _run_rank(group: dict, rank: int, rendezvous: Path, folder: Path) -> None:
    """Never returns: the process ends here."""
    os.environ.update(
        NPUSIM_RANK=str(rank),
        NPUSIM_CARDS=str(group["cards"]),
        NPUSIM_RENDEZVOUS=str(rendezvous),
        TORCH_NPU_SIM_SOC=group["soc"],
    )
    status = 1
    try:
        options = ["-p", "no:cacheprovider", "-q", "--no-header", "--no-summary"]
        options += ["--basetemp", f"{rendezvous}.{rank}"]
        recorder = Recorder(folder / f"reports.{rank}.jsonl")
        status = int(pytest.main([*options, *group["tests"]], plugins=[recorder]))
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # torch_npu's and the streams' threads need not end for the reports to be complete.
    os._exit(status)


def _wait(ranks: dict[int, int], deadline: float) -> int:
    """Reaps the ranks; those left over after the deadline or after a dead one are killed."""
    worst = 0
    while ranks:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            del ranks[process]
            worst = max(worst, os.waitstatus_to_exitcode(status) != 0)
            deadline = min(deadline, time.monotonic() + STRAGGLER_SECONDS)
        elif time.monotonic() > deadline:
            print(f"ranks {sorted(ranks.values())} did not end in time", flush=True)
            for straggler in ranks:
                os.kill(straggler, signal.SIGKILL)
            deadline = float("inf")
        else:
            time.sleep(0.02)
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
