"""Training gives the same losses at every layout, and those of transformers with torch's AdamW."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distributed.harness import Launches, each_check
from distributed.train_worker import CHECKS, LAYOUTS, TOLERANCE
from distributed.trainings import apart

WORKER = Path(__file__).with_name("train_worker.py")
BY_NAME = {check.name: check for check in CHECKS.all()}

test_train = each_check(WORKER, CHECKS)


@pytest.mark.distributed
@pytest.mark.parametrize("tied", ["untied", "tied"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "tp1-pp1"])
def test_losses_are_those_of_one_process(layout: str, tied: str, launches: Launches) -> None:
    losses = _losses(f"{layout}-{tied}", launches)
    alone = _losses(f"tp1-pp1-{tied}", launches)
    assert apart(losses, alone) <= TOLERANCE


def _losses(name: str, launches: Launches) -> list[float]:
    result = launches.result(WORKER, BY_NAME[name])
    result.require()
    found, _ = json.JSONDecoder().raw_decode(result.detail)
    return found["losses"]
