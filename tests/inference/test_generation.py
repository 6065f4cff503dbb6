"""Generated tokens are transformers', at every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributed.harness import Check, Launches
from inference.generation_worker import CHECKS

WORKER = Path(__file__).with_name("generation_worker.py")


@pytest.mark.distributed
@pytest.mark.parametrize("check", CHECKS.all(), ids=str)
def test_generation(check: Check, launches: Launches) -> None:
    launches.result(WORKER, check).require()
