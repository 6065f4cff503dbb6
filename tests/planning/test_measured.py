"""The planner against published measurements of real cards, which it was not fitted to.

Each row is predicted with constants that are fitted to all other rows of its kind.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple

import pytest

from planning.measured import TimedRow, as_cut, rows, timed_rows, why_no_time
from qwen2_ascend.planning.devices import ASCEND, GPU, Rates
from qwen2_ascend.planning.fitting import Measured, fit_rates
from qwen2_ascend.planning.memory import stage_memory
from qwen2_ascend.planning.roofline import step_time

FAMILIES = {"npu": ASCEND, "cuda": GPU}


def measured(kind: str) -> list[TimedRow]:
    return [row for row in timed_rows() if row.kind == kind]


def as_steps(found: list[TimedRow]) -> list[Measured]:
    return [Measured(row.cut, row.device, row.devices_per_node, row.seconds) for row in found]


def error(row: TimedRow, rates: Rates) -> float:
    """Predicted over measured, less one."""
    time = step_time(row.cut, row.device, rates, devices_per_node=row.devices_per_node)
    return time.total / row.seconds - 1


@pytest.mark.parametrize("kind", FAMILIES)
def test_steps_are_predicted_from_the_other_rows(kind: str) -> None:
    """Within 20% on 80% of the rows, and never twice as long or half."""
    found = measured(kind)
    errors = {}
    for row in found:
        others = as_steps([other for other in found if other is not row])
        errors[row.name] = error(row, fit_rates(others))
    sizes = sorted(map(abs, errors.values()))
    near = sum(size <= 0.2 for size in sizes) / len(sizes)
    assert near >= 0.8, errors
    assert sizes[len(sizes) // 2] < 0.1, errors
    assert max(sizes) < 0.5, errors


@pytest.mark.parametrize(("kind", "rates"), FAMILIES.items())
def test_the_constants_are_those_of_the_fit(kind: str, rates: Rates) -> None:
    fitted = fit_rates(as_steps(measured(kind)))
    assert astuple(rates)[:6] == pytest.approx(astuple(fitted)[:6], rel=0.01)
    assert str(len(measured(kind))) in rates.source


def test_what_is_not_stated_has_a_reason() -> None:
    """No row is left out for being predicted badly: the reasons are properties of the runs."""
    reasons = Counter(why_no_time(row) for row in rows())
    assert reasons.pop(None) == len(timed_rows()) == 62
    assert sum(reasons.values()) == len(rows()) - 62
    assert reasons["no time was measured"] == 14
    assert max(reasons.values()) == 14


def test_memory_at_rest_is_what_cards_reported() -> None:
    """Of runs whose state is stated: fp32 gradients and AdamW in fp32. Within 2% on every rank."""
    count = 0
    for row in rows():
        memory, precision = row["measured"].get("memory"), row["precision"]
        is_ours = (
            row["set"] == "A"
            and memory
            and (precision["gradient_buffer"], precision["main_weights"]) == ("fp32", "fp32")
            and not (row["lora"] or row["reuse_fp32_param"] or row["layout"]["tp_2d"])
            and row["code"] != "legacy"
            and row["model"]["position"] == "rope"
            and "stage" not in " ".join(row["notes"])
        )
        if not is_ours:
            continue
        cut = as_cut(row)
        for rank in memory["ranks"]:
            if rank["allocated_mib"]:
                planned = stage_memory(cut, rank["stage"]).at_rest / 2**20
                assert planned == pytest.approx(rank["allocated_mib"], rel=0.02), row["id"]
                count += 1
    assert count == 18


def test_few_measured_steps_move_the_constants_only_as_far_as_they_say() -> None:
    """A machine whose links alone are half as fast: the fit finds it, and nothing else moves."""
    found = measured("npu")
    slow = Rates(**{**vars(ASCEND), "links": ASCEND.links / 2})
    steps = []
    for row in found[:12]:
        time = step_time(row.cut, row.device, slow, devices_per_node=row.devices_per_node)
        steps.append(Measured(row.cut, row.device, row.devices_per_node, time.total))
    fitted = fit_rates(steps, ASCEND)
    assert fitted.links == pytest.approx(slow.links, rel=0.15)
    assert fitted.products == pytest.approx(ASCEND.products, rel=0.05)
