"""At every layout the model agrees with transformers, and planted faults are found."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignment.align_worker import CHECKS
from distributed.harness import Check, Launches

WORKER = Path(__file__).with_name("align_worker.py")


@pytest.mark.distributed
@pytest.mark.parametrize("check", CHECKS.all(), ids=str)
def test_align(check: Check, launches: Launches) -> None:
    launches.result(WORKER, check).require()
