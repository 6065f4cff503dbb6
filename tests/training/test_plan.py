"""All ranks follow one plan, which rank 0 makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import tiny_config
from qwen2_ascend.training.length import RunLength
from qwen2_ascend.training.plan import RunPlan
from qwen2_ascend.training.settings import parse
from training.plan_worker import CHECKS

WORKER = Path(__file__).with_name("plan_worker.py")
FLAGS = "--mock-data --seq-length 8 --lr 1e-3"


def plan(flags: str) -> RunPlan:
    settings = parse(f"{FLAGS} {flags}".split())
    return RunPlan(settings=settings, config=tiny_config(), world_size=2, source=None)


@pytest.mark.distributed
@pytest.mark.parametrize("check", CHECKS.all(), ids=str)
def test_ranks(check, launches) -> None:
    launches.result(WORKER, check).require()


def test_a_plan_is_as_long_as_its_flags_say() -> None:
    found = plan("--train-samples 50 --micro-batch-size 4").length
    assert found == RunLength(train_iters=6, global_batch_size=8)


def test_facts_hold_everything_but_paths() -> None:
    one = plan("--train-iters 3 --save here --report-dir there --num-workers 2").facts()
    other = plan("--train-iters 3 --save /elsewhere --report-dir /there").facts()
    assert one == other
    assert plan("--train-iters 3 --seed 5").facts() != one
    assert plan("--train-iters 3 --no-save-optim").facts() != one
