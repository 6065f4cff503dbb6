"""Memory and traffic as planned are those of training steps on CPU ranks."""

from __future__ import annotations

from pathlib import Path

from distributed.harness import each_check
from planning.planning_worker import CHECKS

WORKER = Path(__file__).with_name("planning_worker.py")
test_planned_is_measured = each_check(WORKER, CHECKS)
