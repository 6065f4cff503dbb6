"""Runs go on where another tool stopped, with the optimizer: Megatron's own layout, both ways."""

from __future__ import annotations

from pathlib import Path

from distributed.harness import each_check
from interop.megatron_optimizer_worker import CHECKS

WORKER = Path(__file__).with_name("megatron_optimizer_worker.py")
test_megatron_optimizer = each_check(WORKER, CHECKS)
