"""At every layout the model agrees with transformers, and planted faults are found."""

from __future__ import annotations

from pathlib import Path

from alignment.align_worker import CHECKS
from distributed.harness import each_check

WORKER = Path(__file__).with_name("align_worker.py")
test_align = each_check(WORKER, CHECKS)
