"""The chunked cross entropy gives what the plain one gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributed.harness import Check, Launches
from model.cross_entropy_worker import CHECKS

WORKER = Path(__file__).with_name("cross_entropy_worker.py")


@pytest.mark.distributed
@pytest.mark.parametrize("check", CHECKS.all(), ids=str)
def test_cross_entropy(check: Check, launches: Launches) -> None:
    launches.result(WORKER, check).require()
