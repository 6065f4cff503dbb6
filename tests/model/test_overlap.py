"""Products in pieces that are exchanged while the next is computed."""

from __future__ import annotations

from pathlib import Path

from distributed.harness import each_check
from model.overlap_worker import CHECKS

WORKER = Path(__file__).parent / "overlap_worker.py"
test_pieces = each_check(WORKER, CHECKS)
