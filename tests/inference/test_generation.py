"""Generated tokens are transformers', at every layout."""

from __future__ import annotations

from pathlib import Path

from distributed.harness import each_check
from inference.generation_worker import CHECKS

WORKER = Path(__file__).with_name("generation_worker.py")
test_generation = each_check(WORKER, CHECKS)
