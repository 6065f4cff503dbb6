"""Pretraining data on several ranks: built once, read the same everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_worker import CHECKS

from distributed.harness import Check, Launches

WORKER = Path(__file__).parent / "data_worker.py"


@pytest.mark.distributed
@pytest.mark.parametrize("check", CHECKS.all(), ids=str)
def test_data_on_ranks(check: Check, launches: Launches) -> None:
    launches.result(WORKER, check).require()
