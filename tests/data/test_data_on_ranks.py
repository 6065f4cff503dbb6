"""Pretraining data on several ranks: built once, read the same everywhere."""

from __future__ import annotations

from pathlib import Path

from data_worker import CHECKS

from distributed.harness import each_check

WORKER = Path(__file__).parent / "data_worker.py"
test_data_on_ranks = each_check(WORKER, CHECKS)
