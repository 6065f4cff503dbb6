"""Attention over rows that several ranks share gives what it gives on whole rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributed.harness import Check, Launches
from model.context_parallel_worker import CHECKS

WORKER = Path(__file__).with_name("context_parallel_worker.py")


@pytest.mark.distributed
@pytest.mark.parametrize("check", CHECKS.all(), ids=str)
def test_context_parallel(check: Check, launches: Launches) -> None:
    launches.result(WORKER, check).require()
