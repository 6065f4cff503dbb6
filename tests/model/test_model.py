"""Building a model in one process; the layouts are in distributed/test_parity.py."""

from __future__ import annotations

from pathlib import Path

from distributed.harness import each_check
from model.model_worker import CHECKS

WORKER = Path(__file__).with_name("model_worker.py")
test_model = each_check(WORKER, CHECKS)
