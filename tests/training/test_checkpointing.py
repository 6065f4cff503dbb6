"""Training checkpoints: what a resumed run takes from them, and what it refuses."""

from __future__ import annotations

from pathlib import Path

from distributed.harness import each_check
from training.checkpointing_worker import CHECKS

WORKER = Path(__file__).with_name("checkpointing_worker.py")
test_checkpointing = each_check(WORKER, CHECKS)
