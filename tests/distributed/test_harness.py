"""The harness itself: a wrong result on any rank is seen, and a hang ends."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from distributed import harness
from distributed.failing_worker import CHECKS
from distributed.harness import Launches, launch

WORKER = Path(__file__).with_name("failing_worker.py")
BY_NAME = {check.name: check for check in CHECKS.all()}

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """The failing worker's two-rank launch, with a short patience."""
    patch = pytest.MonkeyPatch()
    patch.setenv("CHECKS_STALL_SECONDS", "8")
    launches = Launches(tmp_path_factory.mktemp("failing"))
    launches.result(WORKER, BY_NAME["all_is_well"])
    patch.undo()
    return launches


def test_what_is_well_stays_well(results: Launches) -> None:
    result = results.result(WORKER, BY_NAME["all_is_well"])
    assert result.ok
    assert result.detail.startswith("seen by rank 0")
    results.result(WORKER, BY_NAME["ranks_are_processes_of_their_own"]).require()


def test_a_failure_on_another_rank_counts(results: Launches) -> None:
    result = results.result(WORKER, BY_NAME["one_rank_fails"])
    assert not result.ok
    assert "rank 1: Traceback" in result.detail
    assert "only rank 0 is right" in result.detail
    with pytest.raises(AssertionError, match="only rank 0 is right"):
        result.require()
    assert results.result(WORKER, BY_NAME["it_goes_on_after_that"]).ok


def test_a_rank_that_hangs_fails_its_check_and_those_after_it(results: Launches) -> None:
    hung = results.result(WORKER, BY_NAME["one_rank_hangs"])
    assert not hung.ok
    assert "rank(s) [1] never finished this check" in hung.detail
    unreached = results.result(WORKER, BY_NAME["never_reached"])
    assert not unreached.ok
    assert unreached.detail.startswith("not reached. launch: rank 0 ended with exit status 1")
    assert "DistStoreError" in unreached.detail


def test_the_timeout_leaves_no_process(tmp_path: Path) -> None:
    started = time.monotonic()
    results = launch(WORKER, 1, tmp_path, timeout=12)
    assert time.monotonic() - started < 60
    assert not results["launch"].ok
    told = results["launch"].detail
    assert told.startswith("launch: killed after 12 seconds, with rank(s) [0] still running")
    rank, sleeper = map(int, (tmp_path / "processes").read_text().split())
    assert not psutil.pid_exists(rank) and not psutil.pid_exists(sleeper)


def test_a_rank_that_is_gone_ends_the_others_and_is_named(tmp_path: Path) -> None:
    """Whether it left without a word or was killed; the servers go on after that."""
    gone = launch(WORKER, 3, tmp_path / "gone", timeout=120)["launch"]
    assert gone.detail.startswith("launch: rank 2 ended with exit status 7")
    assert "the last words of rank 2" in gone.detail and not gone.ok
    killed = launch(WORKER, 4, tmp_path / "killed", timeout=120)["launch"]
    assert killed.detail.startswith("launch: rank 1 ended with SIGKILL") and not killed.ok


def test_a_script_that_cannot_run_is_told(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text("import nowhere_to_be_found")
    result = launch(script, 1, tmp_path)["launch"]
    assert result.detail.startswith("launch: rank 0 ended with exit status 1")
    assert "No module named 'nowhere_to_be_found'" in result.detail and not result.ok
    script.write_text("print('nothing to do')")
    assert launch(script, 1, tmp_path)["launch"].ok


def test_a_server_that_ends_is_told_and_another_one_serves(tmp_path: Path) -> None:
    server = harness._fork_server(0)
    server._process.kill()
    with pytest.raises(RuntimeError, match=r"fork_server\.py does not answer"):
        launch(tmp_path / "worker.py", 1, tmp_path)
    (tmp_path / "worker.py").write_text("print('nothing to do')")
    assert launch(tmp_path / "worker.py", 1, tmp_path)["launch"].ok
