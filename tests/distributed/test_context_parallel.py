"""Context parallelism changes neither losses nor updates nor checkpoints."""

from __future__ import annotations

from pathlib import Path

from distributed.context_worker import CHECKS
from distributed.harness import each_check

WORKER = Path(__file__).with_name("context_worker.py")
test_context_parallel = each_check(WORKER, CHECKS)
