"""Energy in the log of a training run: joules per token of the whole job, step by step.

Each rank measures its own device; what several share is counted once. Only the time of steps
counts: validation and checkpoints are left out, as they are from tokens/s. A step has a figure when
every rank has read its source after it; until then it waits for the next line of the log.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch

from qwen2_ascend.errors import UserError
from qwen2_ascend.runtime import Runtime
from qwen2_ascend.runtime.power import Place
from qwen2_ascend.telemetry.energy import Energy, EnergyMeter, format_energy

logger = logging.getLogger(__name__)


class _Step(NamedTuple):
    begin: float
    end: float
    tokens: int
    """Tokens of the whole job."""


class _Sum(NamedTuple):
    """The sum over all ranks."""

    joules: float = 0.0
    idle_joules: float = 0.0
    watts: float = 0.0
    """Each rank's mean over its own time, added up."""
    idle_watts: float = 0.0
    seconds: float = 0.0
    tokens: int = 0

    def plus(self, other: _Sum) -> _Sum:
        seconds = self.seconds + other.seconds
        watts = self.watts * self.seconds + other.watts * other.seconds
        return _Sum(
            joules=self.joules + other.joules,
            idle_joules=self.idle_joules + other.idle_joules,
            watts=watts / seconds,
            idle_watts=other.idle_watts,
            seconds=seconds,
            tokens=self.tokens + other.tokens,
        )

    def figures(self) -> Energy:
        return Energy(
            joules_per_token=self.joules / self.tokens,
            joules_per_token_above_idle=(self.joules - self.idle_joules) / self.tokens,
            watts=self.watts,
            idle_watts=self.idle_watts,
        )


class EnergyLog:
    """The energy of a run's steps. Every rank has one, and calls the same methods in step.

    Args:
        runtime: this rank's runtime.
        meter: the meter of this rank's device; `begin` starts it.
    """

    def __init__(self, runtime: Runtime, meter: EnergyMeter) -> None:
        self._runtime = runtime
        self._meter = meter
        self._waiting: deque[_Step] = deque()
        self._total = _Sum()
        self._is_over = False

    @classmethod
    def open(cls, runtime: Runtime) -> EnergyLog | None:
        """The log, or None and a line where a rank has no source; all ranks call it."""
        meter = EnergyMeter.find(Place.of(runtime))
        if reasons := _why_not(runtime, meter):
            logger.info(f"energy: not measured. {reasons}")
            return None
        return cls(runtime, meter)

    def begin(self) -> None:
        """Measures the idle devices, all at once, and starts; before the first step."""
        seconds = max(row[0] for row in _gather(self._runtime, [self._meter.idle_seconds]))
        self._runtime.synchronize()
        self._runtime.barrier()
        idle = self._meter.measure_idle(seconds)
        self._meter.start()
        self._least(-1 if idle is None or self._meter.is_lost else 0)
        if self._is_over:
            return
        names = told_by_ranks(self._runtime, self._meter.name)
        watts = sum(row[0] for row in _gather(self._runtime, [idle or 0.0]))
        logger.info(f"energy: {names}; idle {watts:.1f} W, measured for {seconds:.1f} s")

    def step(
        self, begin: float, end: float, tokens: int, *, is_due: bool, is_last: bool = False
    ) -> Energy | None:
        """Takes a step.

        Args:
            begin: when it began, by time.monotonic.
            end: when it ended.
            tokens: tokens that all ranks together read in it.
            is_due: the log wants figures.
            is_last: wait for a reading, so that no step is left.

        Returns:
            Figures of the steps since the last figures, if `is_due` and there are any.
        """
        if self._is_over:
            return None
        self._waiting.append(_Step(begin, end, tokens))
        if not is_due:
            return None
        if self._meter.counts_energy or is_last:
            self._meter.read_now()
        found = self._take()
        return found.figures() if found and found.tokens else None

    def finish(self) -> None:
        """Says what the run used; every rank calls it when training has ended as it should."""
        self._meter.stop()
        if self._is_over:
            return
        if self._waiting:
            self._take()
        total, self._is_over = self._total, True
        if not total.tokens:
            return
        figures = total.figures()
        logger.info(
            f"energy: {total.joules:,.0f} J for {total.tokens:,} tokens, {format_energy(figures)}, "
            f"idle {figures.idle_watts:.1f} W"
        )

    def close(self) -> None:
        """Ends the reading."""
        self._meter.stop()

    def _take(self) -> _Sum | None:
        """The sum over all ranks of the steps that every rank has measured."""
        ready = sum(self._meter.between(step.begin, step.end) is not None for step in self._waiting)
        count = self._least(-1 if self._meter.is_lost else ready)
        if not count:
            return None
        steps = [self._waiting.popleft() for _ in range(count)]
        seconds = sum(step.end - step.begin for step in steps)
        joules = sum(self._meter.between(step.begin, step.end) or 0.0 for step in steps)
        idle = self._meter.idle_watts or 0.0
        own = [joules, idle * seconds, joules / seconds, idle]
        added = [sum(column) for column in zip(*_gather(self._runtime, own), strict=True)]
        found = _Sum(*added, seconds=seconds, tokens=sum(step.tokens for step in steps))
        self._total = self._total.plus(found)
        self._meter.forget_before(steps[-1].end)
        return found

    def _least(self, ready: int) -> int:
        """The least over all ranks; 0, and no more figures, where one has lost its source."""
        least = round(min(row[0] for row in _gather(self._runtime, [float(ready)])))
        if least >= 0:
            return least
        reasons = told_by_ranks(self._runtime, self._meter.reason if ready < 0 else None)
        self._is_over = True
        self._meter.stop()
        self._waiting.clear()
        logger.info(f"energy: no more figures. {reasons}")
        return 0


def require_power_source(runtime: Runtime) -> None:
    """Refuses a run without a power source, before any work; every rank calls it.

    Raises:
        UserError: some rank has none.
    """
    if reasons := _why_not(runtime, EnergyMeter.find(Place.of(runtime))):
        raise UserError(f"--log-energy: nothing measures energy here. {reasons}")


def _why_not(runtime: Runtime, meter: EnergyMeter) -> str:
    return told_by_ranks(runtime, meter.reason if meter.is_lost else None)


def told_by_ranks(runtime: Runtime, text: str | None) -> str:
    """What ranks have to say, the same thing once; empty when none has. Every rank calls it."""
    everyones: list[str | None] = [None] * runtime.world_size
    torch.distributed.all_gather_object(everyones, text)
    said: dict[str, list[int]] = {}
    for rank, words in enumerate(everyones):
        if words is not None:
            said.setdefault(words, []).append(rank)
    if runtime.world_size == 1:
        return " ".join(said)
    return " ".join(
        f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}: {words}"
        for words, ranks in said.items()
    )


def _gather(runtime: Runtime, values: Sequence[float]) -> list[list[float]]:
    """A row of every rank."""
    own = torch.tensor(values, dtype=torch.float32, device=runtime.device)  # HCCL has no fp64
    rows = [torch.empty_like(own) for _ in range(runtime.world_size)]
    torch.distributed.all_gather(rows, own)
    return torch.stack(rows).tolist()
