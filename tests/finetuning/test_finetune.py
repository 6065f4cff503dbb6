"""Fine-tuning gives transformers' losses at every layout; flags that contradict are refused."""

from __future__ import annotations

from pathlib import Path

from distributed.harness import each_check
from finetuning.finetune_worker import CHECKS

WORKER = Path(__file__).with_name("finetune_worker.py")
test_finetune = each_check(WORKER, CHECKS)
