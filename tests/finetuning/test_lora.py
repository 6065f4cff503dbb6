"""LoRA gives the same losses at every layout, those of an independent loop; LoraConfig's words."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributed.harness import each_check
from finetuning.lora_worker import CHECKS
from qwen2_ascend.errors import UserError
from qwen2_ascend.lora_config import PROJECTIONS, LoraConfig

WORKER = Path(__file__).with_name("lora_worker.py")
test_lora = each_check(WORKER, CHECKS)


def test_targets_are_said_in_either_language() -> None:
    assert LoraConfig(targets=("linear_qkv",)).targets == ("q_proj", "k_proj", "v_proj")
    assert LoraConfig(targets=("down_proj", "linear_fc1", "gate_proj")).targets == (
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    assert LoraConfig(targets=("all-linear",)).targets == tuple(PROJECTIONS)


def test_scaling() -> None:
    assert LoraConfig(rank=4, alpha=8).scaling == 2
    assert LoraConfig(rank=4, alpha=8, use_rslora=True).scaling == 4


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(UserError) as error:
        LoraConfig(rank=0, alpha=float("nan"), dropout=1.0, targets=("q_proj", "lm_head"))
    assert len(error.value.faults) == 4
    assert "target 'lm_head' is not known; use all-linear, Megatron's linear_qkv" in str(
        error.value
    )
    with pytest.raises(UserError, match="at least one target"):
        LoraConfig(targets=())
