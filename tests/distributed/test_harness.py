"""The harness itself: a wrong result on any rank is seen, and a hang ends."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

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
    assert unreached.detail.startswith("not reached. torchrun: exit status 1")


def test_the_timeout_leaves_no_process(tmp_path: Path) -> None:
    started = time.monotonic()
    results = launch(WORKER, 1, tmp_path, timeout=12)
    assert time.monotonic() - started < 30
    assert not results["launch"].ok
    assert "killed after 12 seconds" in results["launch"].detail
    mark = f"CHECKS_FOLDER={tmp_path}".encode()
    left = [path for path in Path("/proc").glob("[0-9]*/environ") if mark in _read(path)]
    assert left == []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
