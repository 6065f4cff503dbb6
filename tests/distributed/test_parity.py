"""The model's logits and gradients equal transformers' at every layout."""

from __future__ import annotations

from pathlib import Path

from distributed.harness import each_check
from distributed.parity_worker import CHECKS

WORKER = Path(__file__).with_name("parity_worker.py")
test_parity = each_check(WORKER, CHECKS)
