"""The planner against published measurements of real cards, which it was not fitted to.

Each row is predicted with constants that are fitted to all other rows of its kind.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple

import pytest

from planning.measured import (
    TimedRow,
    memory_rows,
    rows,
    timed_rows,
    why_no_peak,
    why_no_rest,
    why_no_time,
)
from planning.measured import as_run_layout as measured_cut
from planning.measured_page import (
    BEGIN,
    END,
    PAGE,
    PICTURE,
    as_steps,
    points,
    table,
    times,
)
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.planning.devices import ASCEND, GPU, Rates, find_device
from qwen2_ascend.planning.fitting import Measured, fit_rates
from qwen2_ascend.planning.job import Job, Stack
from qwen2_ascend.planning.memory import stage_memory
from qwen2_ascend.planning.parameters import parameters
from qwen2_ascend.planning.roofline import step_time
from qwen2_ascend.planning.search import Choices, Machine, find_plans

FAMILIES = {"npu": ASCEND, "cuda": GPU}


def measured(kind: str) -> list[TimedRow]:
    return [row for row in timed_rows() if row.kind == kind]


@pytest.mark.parametrize("kind", FAMILIES)
def test_steps_are_predicted_from_the_other_rows(kind: str) -> None:
    """Within 20% on 80% of the rows, and never twice as long or half."""
    errors = {point.row: point.error for point in times(kind)}
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


def test_the_page_says_these_errors() -> None:
    """docs/planning.md's table is what `python -m planning.measured_page` makes."""
    assert f"{BEGIN}\n{table(points())}\n{END}" in PAGE.read_text(encoding="utf-8")
    assert PICTURE.is_file()


def test_what_is_not_stated_has_a_reason() -> None:
    """No row is left out for being predicted badly: the reasons are properties of the runs."""
    found = rows()
    for why, stated in ((why_no_time, 62), (why_no_rest, 29), (why_no_peak, 20)):
        reasons = Counter(why(row) for row in found)
        assert reasons.pop(None) >= stated
        missing = [reasons.pop(f"no {what} was measured", 0) for what in ("time", "memory")]
        assert sum(missing) + sum(reasons.values()) <= len(found) - stated
        assert max(reasons.values()) <= 9, reasons


def test_memory_at_rest_is_what_cards_reported() -> None:
    """Within 2% on every rank: fp32 and 16-bit gradients, reused fp32 weights, O2, LoRA, CP."""
    errors = {f"{row.name} stage {row.stage}": row.rest for row in memory_rows() if row.rest}
    assert len(errors) >= 39
    for name, (measured, planned) in errors.items():
        assert planned == pytest.approx(measured, rel=0.02), name


@pytest.mark.parametrize(("kind", "ranks"), [("npu", 24), ("cuda", 11)])
def test_peaks_are_what_cards_reported(kind: str, ranks: int) -> None:
    """Within 10% on every rank, half of them within 3%.

    The planner's formulas are of this package's tensors, and nothing in them is fitted. What other
    trainers hold besides is a few facts of each (`measured._stack`). Some are read from their code,
    others off these rows, such as 14 bytes of a logit: for those the rows are no independent test.
    """
    found = [row for row in memory_rows() if row.peak and row.kind == kind]
    errors = {f"{row.name} stage {row.stage}": row.peak[1] / row.peak[0] - 1 for row in found}
    assert len(errors) >= ranks
    sizes = sorted(map(abs, errors.values()))
    assert sizes[-1] < 0.1, errors
    assert sizes[len(sizes) // 2] < 0.03, errors


def test_a_first_step_has_no_moments_until_its_update() -> None:
    """Which is when the published baselines were read; later steps are fuller."""
    (row,) = [row for row in rows() if row["id"] == "A08"]
    cut = measured_cut(row)
    first, later = (stage_memory(cut, 0, first_step=is_first) for is_first in (True, False))
    moments = 8 * sum(parameters(cut, 0).buffers) // cut.replicas
    assert first.moment == later.moment == "backward"
    assert later.total - first.total == moments


@pytest.mark.parametrize("row", [row for row in rows() if row["set"] == "D"], ids=lambda r: r["id"])
def test_what_a_vendor_supports_fits(row: dict) -> None:
    """Some layout fits on as many cards as it says; LoRA has the usual rank."""
    number, batch = row["device"]["num_devices"], row["batch"]
    asked = Job(
        config=Qwen2Config.named(
            row["model"]["name"].removeprefix("Qwen2.5-").removeprefix("Qwen2-")
        ),
        seq_length=batch["seq_length"],
        global_batch_size=max(64, number),
        lora_rank=16 if row["lora"] else None,
        stack=Stack(copies_all=False),
    )
    device = find_device("910B2")
    where = Machine(device=device, num_devices=number, devices_per_node=8)
    # two cards hold 7B with gradients and moments in 16 bits alone
    in_16_bits = Choices(o2_gradient=True, o2_optimizer=True) if row["id"] == "D02" else Choices()
    assert find_plans(asked, where, in_16_bits)[0].fits


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
