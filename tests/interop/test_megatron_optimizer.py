"""Runs go on where another tool stopped, with the optimizer: Megatron's own layout, both ways."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributed.harness import Check, Launches
from interop.megatron_optimizer_worker import CHECKS

WORKER = Path(__file__).with_name("megatron_optimizer_worker.py")


@pytest.mark.distributed
@pytest.mark.parametrize("check", CHECKS.all(), ids=str)
def test_megatron_optimizer(check: Check, launches: Launches) -> None:
    launches.result(WORKER, check).require()
