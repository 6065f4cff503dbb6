"""Training checkpoints: what a resumed run takes from them, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributed.harness import Check, Launches
from training.checkpointing_worker import CHECKS

WORKER = Path(__file__).with_name("checkpointing_worker.py")


@pytest.mark.distributed
@pytest.mark.parametrize("check", CHECKS.all(), ids=str)
def test_checkpointing(check: Check, launches: Launches) -> None:
    launches.result(WORKER, check).require()
