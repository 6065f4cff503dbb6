"""Attention over rows that several ranks share gives what it gives on whole rows."""

from __future__ import annotations

from pathlib import Path

from distributed.harness import each_check
from model.context_parallel_worker import CHECKS

WORKER = Path(__file__).with_name("context_parallel_worker.py")
test_context_parallel = each_check(WORKER, CHECKS)
