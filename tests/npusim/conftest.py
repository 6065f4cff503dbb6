"""Tests marked `simulated` run in processes of their own, where torch_npu sees simulated cards.

    @pytest.mark.simulated                  # one card
    @pytest.mark.simulated(cards=2)         # every rank runs the test, in step with the others
    @pytest.mark.simulated(soc=SOC_910C)    # another chip
    @pytest.mark.simulated(cards=2, alone="me")   # not with the others, because it breaks ranks

They are plain tests otherwise: fixtures, parameters, -k and assertions work. At the first of them
one process is started (inside.py) which imports torch_npu once and forks the ranks of every group;
its reports are then given as the tests' own. torch_npu must not be imported here, so such a test's
module imports it inside the functions.

Where the simulated device cannot be had these tests are skipped with the reason, and fail when the
environment says CI=true.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from npusim.build import Unavailable
from npusim.env import SOC_910B, environment

INSIDE = "NPUSIM_FOLDER"
"""Set in the processes that see the simulated cards: a folder that the ranks share."""
TIMEOUT_SECONDS = 3600
"""Time for all simulated tests of a run together."""

REPORTS = pytest.StashKey[dict[str, list[dict]]]()
UNAVAILABLE = pytest.StashKey[str]()


@pytest.fixture(scope="module")
def run():
    """The runtime on this rank's card, and a folder that all ranks share."""
    from distributed.harness import Run
    from qwen2_ascend import runtime

    running = runtime.start("npu", timeout_seconds=60)
    yield Run(running, Path(os.environ[INSIDE]))
    running.close()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "simulated(cards, soc, alone): runs on simulated NPUs")
    # torch 2.13 renames the collectives that megatron-core, and so these tests, call
    config.addinivalue_line("filterwarnings", "ignore:.torch.distributed.* is deprecated")
    # torch_npu says so of its own implementation
    config.addinivalue_line("filterwarnings", "ignore:HCCL doesn't support gather")
    # torch says so of a barrier of megatron-core's or the package's, which name no device
    config.addinivalue_line("filterwarnings", "ignore:barrier.*using the device under current")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("simulated"):
            item.add_marker(pytest.mark.timeout(TIMEOUT_SECONDS + 60))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if INSIDE in os.environ or item.get_closest_marker("simulated") is None:
        return None
    if REPORTS not in item.session.stash and UNAVAILABLE not in item.session.stash:
        try:
            item.session.stash[REPORTS] = _run_inside(item.session)
        except Unavailable as error:
            item.session.stash[UNAVAILABLE] = str(error)
    if UNAVAILABLE in item.session.stash:
        return None  # pytest_runtest_setup says why
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for data in item.session.stash[REPORTS][item.nodeid]:
        data["nodeid"] = item.nodeid
        report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
        item.ihook.pytest_runtest_logreport(report=report)
    # pytest takes down what earlier tests have set up where the last of them ends: here, this one
    item.session._setupstate.teardown_exact(nextitem)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_runtest_setup(item: pytest.Item) -> None:
    reason = item.session.stash.get(UNAVAILABLE, None)
    if reason is None or item.get_closest_marker("simulated") is None:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(f"the simulated device must be there in CI: {reason}", pytrace=False)
    pytest.skip(f"no simulated device: {reason}")


def _run_inside(session: pytest.Session) -> dict[str, list[dict]]:
    """Runs all simulated tests of the session; their reports by node id."""
    groups: dict[str, dict] = {}
    for item in session.items:
        if item.get_closest_marker("simulated"):
            group = _group(item)
            groups.setdefault(json.dumps(group), {**group, "tests": []})["tests"].append(
                item.nodeid
            )
    folder = session.config._tmp_path_factory.mktemp("npusim")  # type: ignore[attr-defined]
    (folder / "groups.json").write_text(json.dumps(list(groups.values())), encoding="utf-8")
    command = [sys.executable, "-m", "npusim.inside", str(session.config.rootpath), str(folder)]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
        try:
            process.wait(TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()  # it takes its ranks with it
            process.wait()
    return {
        test: _reports(folder / str(number), group["cards"], test)
        for number, group in enumerate(groups.values())
        for test in group["tests"]
    }


def _group(item: pytest.Item) -> dict:
    """Tests with the same options share their ranks."""
    options: dict = {"cards": 1, "soc": SOC_910B, "alone": ""}
    for marker in reversed(list(item.iter_markers("simulated"))):
        options.update(marker.kwargs)
    return options


def _reports(folder: Path, cards: int, test: str) -> list[dict]:
    """The first rank's reports; or those of the first rank that failed."""
    of_ranks = [_reports_of_rank(folder, rank, test) for rank in range(cards)]
    return next((reports for reports in of_ranks if _failed(reports)), of_ranks[0])


def _reports_of_rank(folder: Path, rank: int, test: str) -> list[dict]:
    path = folder / f"reports.{rank}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    reports = [report for report in map(json.loads, lines) if report["nodeid"] == test]
    if not reports or reports[-1]["when"] != "teardown":
        return [_not_finished(test, f"rank {rank} did not finish this test.\n{_log(folder, rank)}")]
    for report in reports:
        if isinstance(report["longrepr"], list):  # of a skip: pytest has it as a tuple
            report["longrepr"] = tuple(report["longrepr"])
    return reports


def _log(folder: Path, rank: int) -> str:
    """The end of what a rank, or else the process that starts them all, printed."""
    for path in (folder / f"log.{rank}.txt", folder.parent / "log.txt"):
        if path.exists():
            return path.read_text(encoding="utf-8", errors="replace")[-4000:]
    return "It was never started."


def _failed(reports: list[dict]) -> bool:
    return any(report["outcome"] == "failed" for report in reports)


def _not_finished(test: str, why: str) -> dict:
    report = pytest.TestReport(
        test, (test, None, test), {}, outcome="failed", longrepr=why, when="call"
    )
    return {"$report_type": "TestReport", **report._to_json()}


# --- inside ---------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def simulator(request: pytest.FixtureRequest):
    """The entered Simulator, in tests marked `simulated`."""
    if INSIDE not in os.environ:
        yield None
        return
    import torch

    from npusim.simulator import Simulator

    torch.manual_seed(0)
    with Simulator() as entered:
        yield entered


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest):
    """This rank among the simulated cards, with HCCL started; see cards.py."""
    from torch.distributed import destroy_process_group

    from npusim.cards import join

    ranks = join()
    assert ranks.size == getattr(request, "param", ranks.size)
    yield ranks
    destroy_process_group()
