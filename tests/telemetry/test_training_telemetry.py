"""Energy in the log of two ranks, and a profiler on one of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from distributed.harness import each_check
from logs import logged_lines
from qwen2_ascend.telemetry import training_energy
from qwen2_ascend.telemetry.energy import EnergyMeter
from qwen2_ascend.telemetry.training_energy import EnergyLog
from telemetry.telemetry_worker import CHECKS

WORKER = Path(__file__).with_name("telemetry_worker.py")
test_telemetry = each_check(WORKER, CHECKS)


def test_a_step_waits_for_the_reading_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source of power that is read once a second, and steps of 0.4 s: nothing is continued."""
    monkeypatch.setattr(training_energy, "_gather", lambda runtime, values: [list(values)])
    clock = SimpleNamespace(now=0.0)
    source = SimpleNamespace(
        name="a fake", counts_energy=False, period_seconds=3600.0, read=lambda: 200.0
    )
    meter = EnergyMeter(source, clock=lambda: clock.now)
    meter.idle_watts = 50.0
    meter.start()
    log = EnergyLog(SimpleNamespace(), meter)  # type: ignore[arg-type]
    figures = []
    for step in range(1, 6):
        clock.now = 0.5 * step
        if step % 2 == 0:
            meter.read_now()
        figures.append(log.step(clock.now - 0.4, clock.now, 100, is_due=True))
    # steps 2 and 4 end with a reading; 1 and 3 are told with them; 5 waits for the end
    assert [figure is None for figure in figures] == [True, False, True, False, True]
    assert figures[1].watts == pytest.approx(200.0)
    assert figures[1].joules_per_token == pytest.approx(2 * 0.4 * 200 / 200)
    assert figures[1].joules_per_token_above_idle == pytest.approx(2 * 0.4 * 150 / 200)
    clock.now = 3.0
    with logged_lines() as said:
        log.finish()
    assert said == [
        "energy: 400 J for 500 tokens, 0.8 J/token (0.6 above idle) | 200.0 W, idle 50.0 W"
    ]
