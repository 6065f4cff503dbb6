"""The chunked cross entropy gives what the plain one gives."""

from __future__ import annotations

from pathlib import Path

from distributed.harness import each_check
from model.cross_entropy_worker import CHECKS

WORKER = Path(__file__).with_name("cross_entropy_worker.py")
test_cross_entropy = each_check(WORKER, CHECKS)
