"""Memory and traffic as planned are those of training steps on CPU ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributed.harness import Check, Launches
from planning.planning_worker import CHECKS

WORKER = Path(__file__).with_name("planning_worker.py")


@pytest.mark.distributed
@pytest.mark.parametrize("check", CHECKS.all(), ids=str)
def test_planned_is_measured(check: Check, launches: Launches) -> None:
    launches.result(WORKER, check).require()
