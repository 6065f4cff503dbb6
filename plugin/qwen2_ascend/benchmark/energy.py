"""Joules per token of a benchmark's sides, measured by the process that asks them.

One side works at a time while the others are loaded and idle, so what is drawn above idle is its.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwen2_ascend import markdown
from qwen2_ascend.benchmark.measure import spread
from qwen2_ascend.benchmark.sides import Side
from qwen2_ascend.runtime.power import Place
from qwen2_ascend.telemetry.energy import EnergyMeter


class SideEnergy:
    """Measures what a device uses while a side answers.

    Args:
        device: cpu, cuda or npu; the first one of the machine.
        say: prints a line.
        meter: by default one of the device.
    """

    def __init__(
        self, device: str, say: Callable[[str], None] = print, meter: EnergyMeter | None = None
    ) -> None:
        self._meter = meter or EnergyMeter.find(Place(device=device))
        self._say = say

    def begin(self) -> None:
        """Measures the idle device, when all sides are loaded; says what measures, or why not."""
        idle = self._meter.measure_idle()
        if idle is None:
            self._say(f"energy: not measured. {self._meter.reason}")
        else:
            self._say(f"energy: {self._meter.name}; idle {idle:.1f} W")

    def ask(self, side: Side, question: Any) -> dict[str, Any]:
        """The side's answer, a dict, with `joules` and `joules_above_idle`, None where unknown."""
        was_lost = self._meter.is_lost
        with self._meter as meter:
            answer = side.ask(question)
        if meter.is_lost and not was_lost:
            self._say(f"energy: no more figures. {meter.reason}")
        figures = {"joules": meter.joules, "joules_above_idle": meter.joules_above_idle}
        return {**answer, **figures, "no_energy": None if meter.joules else meter.reason}


def energy_figures(answers: Sequence[Mapping[str, Any]], tokens: int) -> dict[str, Any]:
    """Joules per token of each round for a report, or None, and why.

    Args:
        answers: what `SideEnergy.ask` returned, a round each.
        tokens: the tokens of a round.
    """
    reasons = [answer["no_energy"] for answer in answers if answer.get("no_energy")]
    has_all = bool(answers) and all(answer.get("joules") is not None for answer in answers)
    figures: dict[str, Any] = {"no_energy": reasons[0] if reasons else None}
    for name in ("joules", "joules_above_idle"):
        key = name.replace("joules", "joules_per_token")
        figures[key] = [answer[name] / tokens for answer in answers] if has_all else None
    return figures


def energy_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """What to print; nothing where a figure is missing, which has been said.

    Args:
        rows: by side, with `energy_figures` in each.
    """
    if any(row["joules_per_token"] is None for row in rows.values()):
        return ""
    lines = []
    for side, row in rows.items():
        both = (row["joules_per_token"], row["joules_per_token_above_idle"])
        lines.append([side, *(spread(values, ".4g") for values in both)])
    return markdown.table(("side", "J/token", "J/token above idle"), lines)
