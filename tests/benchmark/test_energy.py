"""Joules per token beside the speeds of a benchmark."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from qwen2_ascend.benchmark.energy import SideEnergy, energy_figures, energy_table
from qwen2_ascend.runtime.power import PowerReadingError
from qwen2_ascend.telemetry.energy import EnergyMeter


class Bench:
    """A device that draws 10 W idle and 60 W while the side works, for as long as it is told to."""

    name = "a fake"
    counts_energy = True
    period_seconds = 3600.0

    def __init__(self) -> None:
        self.now, self.joules, self.is_lost = 0.0, 0.0, False
        self.said: list[str] = []
        meter = EnergyMeter(self, clock=lambda: self.now)
        self.energy = SideEnergy("cpu", self.said.append, meter)

    def read(self) -> float:
        if self.is_lost:
            raise PowerReadingError("unplugged")
        return self.joules

    def ask(self, question: float) -> dict[str, Any]:
        self.pass_(question, 60.0)
        return {"wall": question}

    def pass_(self, seconds: float, watts: float) -> None:
        self.now += seconds
        self.joules += watts * seconds


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    found = Bench()
    idle = SimpleNamespace(sleep=lambda seconds: found.pass_(seconds, 10.0))
    monkeypatch.setattr("qwen2_ascend.telemetry.energy.time", idle)
    return found


def test_each_side_is_measured_above_idle(bench: Bench) -> None:
    bench.energy.begin()
    answers = [bench.energy.ask(bench, seconds) for seconds in (2.0, 4.0)]
    assert bench.said == ["energy: a fake; idle 10.0 W"]
    assert [answer["wall"] for answer in answers] == [2.0, 4.0]
    figures = energy_figures(answers, tokens=100)
    assert figures["joules_per_token"] == pytest.approx([1.2, 2.4])
    assert figures["joules_per_token_above_idle"] == pytest.approx([1.0, 2.0])
    assert (
        energy_table({"ours": figures}).splitlines()[-1] == "| ours | 1.8 (1.2-2.4) | 1.5 (1-2) |"
    )


def test_without_a_source_nothing_is_told_but_why() -> None:
    said: list[str] = []
    energy = SideEnergy("cpu", said.append, EnergyMeter(None, "nothing here."))
    energy.begin()
    answers = [energy.ask(Bench(), 1.0)]
    figures = energy_figures(answers, tokens=100)
    assert said == ["energy: not measured. nothing here."]
    assert figures["joules_per_token"] is None and answers[0]["joules"] is None
    assert figures["no_energy"] == "nothing here." and energy_table({"ours": figures}) == ""


def test_a_source_that_is_lost_takes_the_figures_with_it(bench: Bench) -> None:
    bench.energy.begin()
    answers = [bench.energy.ask(bench, 1.0)]
    bench.is_lost = True
    answers += [bench.energy.ask(bench, 1.0) for _ in range(2)]
    assert bench.said[1:] == ["energy: no more figures. the power source was lost: unplugged."]
    figures = energy_figures(answers, tokens=100)
    assert figures["joules_per_token"] is None and "unplugged" in figures["no_energy"]
