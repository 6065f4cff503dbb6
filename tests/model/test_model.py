"""Building a model in one process; the layouts are in distributed/test_parity.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributed.harness import Check, Launches
from model.model_worker import CHECKS

WORKER = Path(__file__).with_name("model_worker.py")


@pytest.mark.distributed
@pytest.mark.parametrize("check", CHECKS.all(), ids=str)
def test_model(check: Check, launches: Launches) -> None:
    launches.result(WORKER, check).require()
