"""Fine-tuning gives transformers' losses at every layout; flags that contradict are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributed.harness import Check, Launches
from finetuning.finetune_worker import CHECKS

WORKER = Path(__file__).with_name("finetune_worker.py")


@pytest.mark.distributed
@pytest.mark.parametrize("check", CHECKS.all(), ids=str)
def test_finetune(check: Check, launches: Launches) -> None:
    launches.result(WORKER, check).require()
