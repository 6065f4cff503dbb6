"""Joules of known curves of power, by a clock that the tests turn; and sources that fail."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from qwen2_ascend.runtime.power import Place, PowerReadingError
from qwen2_ascend.runtime.power_sources import find_power_source
from qwen2_ascend.telemetry import energy
from qwen2_ascend.telemetry.energy import EnergyCurve, EnergyMeter


class Clock:
    """Stands still until it is turned."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Source:
    """Reads a function of the clock's time; `period_seconds` keeps the thread out of the way."""

    name = "a fake"
    period_seconds = 3600.0

    def __init__(
        self, clock: Clock, of_time: Callable[[float], float], counts_energy: bool = False
    ) -> None:
        self.clock, self.of_time, self.counts_energy = clock, of_time, counts_energy
        self.faults: Iterator[Exception | None] = iter(())

    def read(self) -> float:
        if fault := next(self.faults, None):
            raise fault
        return self.of_time(self.clock())


def faked(
    of_time: Callable[[float], float], counts_energy: bool = False
) -> tuple[Clock, Source, EnergyMeter]:
    clock = Clock()
    source = Source(clock, of_time, counts_energy)
    return clock, source, EnergyMeter(source, clock=clock)


def measured(
    of_time: Callable[[float], float], seconds: float, readings: int, counts_energy: bool = False
) -> EnergyMeter:
    clock, _, meter = faked(of_time, counts_energy)
    with meter:
        for _ in range(readings - 2):
            clock.now += seconds / (readings - 1)
            assert meter.read_now()
        clock.now = 100.0 + seconds
    return meter


def test_constant_and_rising_power_are_integrated_exactly() -> None:
    assert measured(lambda t: 250.0, 8.0, 5).joules == pytest.approx(2000.0)
    rising = measured(lambda t: 10.0 * (t - 100.0), 8.0, 5)
    assert (rising.joules, rising.watts) == (pytest.approx(320.0), pytest.approx(40.0))


def test_a_curved_power_is_integrated_as_finely_as_it_is_read() -> None:
    """P = 300 + 50 sin(t): the error falls with the square of the period, as a trapezoid's does."""
    begin, seconds = 100.0, 10.0
    exact = 300 * seconds + 50 * (math.cos(begin) - math.cos(begin + seconds))
    errors = []
    for readings in (21, 41, 81):
        joules = measured(lambda t: 300 + 50 * math.sin(t), seconds, readings).joules
        assert joules is not None
        errors.append(abs(joules - exact))
    assert errors[0] < 0.002 * exact
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


def test_a_counter_needs_its_ends_alone() -> None:
    meter = measured(lambda t: 1e6 + 70 * (t - 100) ** 2, 10.0, 2, counts_energy=True)
    assert (meter.joules, meter.seconds) == (pytest.approx(7000.0), pytest.approx(10.0))


def test_parts_of_a_measurement_add_up() -> None:
    curve = EnergyCurve(counts_energy=False)
    for moment, watts in ((0.0, 100.0), (1.0, 200.0), (3.0, 0.0)):
        curve.add(moment, watts)
    assert curve.joules(0.0, 3.0) == pytest.approx(350.0)
    # 100 to 200 W in a second: 125 W in its first half on average
    assert curve.joules(0.0, 0.5) == pytest.approx(62.5)
    assert curve.joules(2.0, 3.0) == pytest.approx(50.0)
    for cut in (0.25, 1.0, 2.7):
        assert curve.joules(0.0, cut) + curve.joules(cut, 3.0) == pytest.approx(350.0)
    curve.forget_before(1.5)
    assert curve.first_time == 1.0 and curve.joules(1.0, 3.0) == pytest.approx(200.0)
    counter = EnergyCurve(counts_energy=True)
    counter.add(0.0, 1000.0)
    counter.add(10.0, 1500.0)
    assert counter.joules(2.0, 4.0) == pytest.approx(100.0)


def test_idle_is_measured_before_and_taken_off() -> None:
    clock, _, meter = faked(lambda t: 5.0 * t, counts_energy=True)
    meter.start()
    clock.now += 2.0
    meter.stop()
    assert meter.joules_above_idle is None, "without a baseline nothing is taken off"
    meter.idle_watts = meter.watts
    assert meter.idle_watts == pytest.approx(5.0)
    meter._source = Source(clock, lambda t: 8.0 * t, counts_energy=True)
    with meter:
        clock.now += 10.0
    assert meter.joules == pytest.approx(80.0)
    assert meter.joules_above_idle == pytest.approx(30.0)


def test_the_thread_reads_and_idle_waits() -> None:
    """The clock is real: 40 W are counted by a source that is asked every 5 ms."""
    source = Source(Clock(), lambda t: 40.0)
    source.clock, source.period_seconds = time.monotonic, 0.005  # type: ignore[assignment]
    meter = EnergyMeter(source)
    assert meter.measure_idle(0.1) == pytest.approx(40.0)
    with meter:
        while meter._curve.num_readings < 5:
            time.sleep(0.005)
    assert meter.joules == pytest.approx(40.0 * (meter.seconds or 0))
    assert meter.joules_above_idle == pytest.approx(0.0, abs=1e-9)
    assert meter.reason is None and meter._thread is None


def test_too_few_readings_of_power_are_no_figure() -> None:
    meter = measured(lambda t: 100.0, 0.3, 2)
    assert (meter.joules, meter.watts, meter.joules_above_idle) == (None, None, None)
    assert "too short to be measured: 2 reading(s) of a fake" in (meter.reason or "")


def test_a_single_miss_is_bridged_and_three_are_a_loss() -> None:
    clock, source, meter = faked(lambda t: 100.0)
    meter.start()
    miss = PowerReadingError("npu-smi shows no power")
    source.faults = iter((miss, miss, None, miss, None, None))
    for expected in (False, False, True, False, True):
        clock.now += 1.0
        assert meter.read_now() is expected
    clock.now += 1.0
    meter.stop()
    assert meter.joules == pytest.approx(600.0)

    meter.start()
    source.faults = iter((None, miss, miss, miss))
    for _ in range(4):
        clock.now += 1.0
        meter.read_now()
    meter.stop()
    assert meter.joules is None and meter.is_lost
    assert meter.reason == "the power source was lost: npu-smi shows no power."
    with meter:  # does not come back by itself, and does not fail
        clock.now += 1.0
    assert meter.joules is None and meter.seconds is None


def test_a_counter_that_goes_back_is_lost_not_wrapped_by_guess() -> None:
    clock, _, meter = faked(lambda t: 1000.0 - t, counts_energy=True)
    with meter:
        clock.now += 1.0
    assert meter.joules is None and "the energy counter went back" in (meter.reason or "")


def test_an_unforeseen_error_ends_the_measuring_and_not_the_work() -> None:
    clock, source, meter = faked(lambda t: 1.0)
    with meter:
        source.faults = iter((RuntimeError("segmentation of the bus"),))
        clock.now += 1.0
        assert not meter.read_now()
    assert meter.joules is None and "segmentation of the bus" in (meter.reason or "")


def test_without_a_source_there_is_a_reason_and_no_figure(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(energy, "find_power_source", partial(find_power_source, root=tmp_path))
    meter = EnergyMeter.find(Place(device="cpu"))
    assert meter.measure_idle() is None
    with meter:
        pass
    assert (meter.joules, meter.joules_above_idle, meter.watts, meter.name) == (None,) * 4
    assert "/sys/class/powercap is not there" in (meter.reason or "")


def test_a_search_that_fails_is_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(energy, "find_power_source", broken)
    meter = EnergyMeter.find(Place(device="cpu"))
    assert meter.is_lost and "not yours" in (meter.reason or "")


def test_moments_outside_of_the_readings_have_no_figure() -> None:
    clock, _, meter = faked(lambda t: 10.0)
    meter.start()
    clock.now += 1.0
    assert meter.between(100.0, 100.5) is None, "not read since: nothing is continued"
    meter.read_now()
    assert meter.between(100.0, 100.5) == pytest.approx(5.0)
    assert meter.between(99.0, 100.5) is None
    meter.stop()
