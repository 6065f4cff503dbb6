"""Context parallelism changes neither losses nor updates nor checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributed.context_worker import CHECKS
from distributed.harness import Check, Launches

WORKER = Path(__file__).with_name("context_worker.py")


@pytest.mark.distributed
@pytest.mark.parametrize("check", CHECKS.all(), ids=str)
def test_context_parallel(check: Check, launches: Launches) -> None:
    launches.result(WORKER, check).require()
