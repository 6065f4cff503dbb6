"""Energy and profiling in real training on two ranks, whose power sources are fakes."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

from distributed.harness import Checks, Run, main
from distributed.train_worker import start
from logs import logged_lines

CHECKS = Checks()
FLAGS = (
    "--mock-data --seq-length 24 --global-batch-size 4 --micro-batch-size 2 --train-iters 6 "
    "--lr 1e-3 --device cpu"
)
TOKENS = 4 * 24
IDLE_WATTS, BUSY_WATTS = (20.0, 5.0), (300.0, 50.0)
"""Watts of each rank."""


class Counter:
    """Counts what a rank draws: little, until `is_busy`. Its clock stands still while it is read,
    so that no figure depends on how busy the machine is."""

    counts_energy = True
    period_seconds = 0.05

    def __init__(self, rank: int, is_to_be_lost: bool = False) -> None:
        self.name = f"fake {rank}"
        self.rank, self.is_busy, self.is_to_be_lost = rank, False, is_to_be_lost
        self._joules, self._at = 0.0, time.monotonic()
        self._asked: float | None = None

    def clock(self) -> float:
        """The clock that is asked before and after each reading."""
        asked = self._asked
        self._asked = time.monotonic() if asked is None else None
        return self._asked if asked is None else asked  # type: ignore[return-value]

    def read(self) -> float:
        from qwen2_ascend.runtime.power import PowerReadingError

        assert self._asked is not None
        if self.is_to_be_lost and self.is_busy:
            self._asked = None
            raise PowerReadingError("unplugged")
        watts = BUSY_WATTS[self.rank] if self.is_busy else IDLE_WATTS[self.rank]
        self._joules += watts * (self._asked - self._at)
        self._at = self._asked
        return self._joules


def trained(run: Run, name: str, flags: str = "", source: Counter | None = None) -> Trained:
    """Trains six steps as the launchers do."""
    from qwen2_ascend.telemetry.energy import EnergyMeter
    from qwen2_ascend.training.plan import make_plan
    from qwen2_ascend.training.setup import train_and_report

    folder = run.folder / name
    training = start(run, f"{FLAGS} --report-dir {folder} {flags}")
    plan = make_plan(training.settings)
    steady = mock.patch.object(EnergyMeter, "idle_seconds", 0.3)
    with logged_lines() as said, steady, powered(source):
        train_and_report(training, plan)
    run.runtime.barrier()
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return Trained(said, [json.loads(line) for line in lines])


class Trained:
    """What a run said on this rank, and its metrics."""

    def __init__(self, said: list[str], rows: list[dict[str, Any]]) -> None:
        self.energy = [line for line in said if line.startswith("energy: ")]
        self.rows = rows
        self.losses = [(row["loss"], row["grad_norm"]) for row in rows]


@contextlib.contextmanager
def powered(source: Counter | None) -> Iterator[None]:
    """Has `source` found, or nothing; it is busy once its idle power is known."""
    from qwen2_ascend.telemetry.energy import EnergyMeter

    real = EnergyMeter.measure_idle

    def measure_idle(meter: EnergyMeter, seconds: float | None = None) -> float | None:
        watts = real(meter, seconds)
        assert source is not None
        source.is_busy = True
        return watts

    def find(*_: object, **__: object) -> EnergyMeter:
        if source is None:
            return EnergyMeter(None, "nothing here.")
        return EnergyMeter(source, clock=source.clock)

    with (
        mock.patch.object(EnergyMeter, "find", find),
        mock.patch.object(EnergyMeter, "measure_idle", measure_idle),
    ):
        yield


@CHECKS.add(world_size=2)
def what_two_ranks_use_is_added(run: Run) -> str:
    found = trained(run, "added", source=Counter(run.runtime.rank))
    assert len(found.rows) == 6
    for row in found.rows:
        assert math.isclose(row["watts"], sum(BUSY_WATTS), rel_tol=1e-4), row
        assert math.isclose(row["idle_watts"], sum(IDLE_WATTS), rel_tol=1e-4), row
        # rank 0's time is known, rank 1's is another one
        joules = row["joules_per_token"] * TOKENS
        idle = joules - row["joules_per_token_above_idle"] * TOKENS
        seconds = (joules - BUSY_WATTS[0] * row["step_seconds"]) / BUSY_WATTS[1]
        expected = IDLE_WATTS[0] * row["step_seconds"] + IDLE_WATTS[1] * seconds
        assert seconds > 0 and math.isclose(idle, expected, rel_tol=1e-3), row
    if run.runtime.rank == 0:
        first, last = found.energy
        assert "rank 0: fake 0 rank 1: fake 1; idle 25.0 W" in first
        assert f" J for {6 * TOKENS:,} tokens, " in last and "350.0 W, idle 25.0 W" in last
    return found.energy[-1]


@CHECKS.add(world_size=2)
def figures_come_at_the_intervals_of_the_log(run: Run) -> str:
    found = trained(run, "interval", "--log-interval 4", source=Counter(run.runtime.rank))
    assert [row["iteration"] for row in found.rows] == [4, 6]
    assert all("watts" in row for row in found.rows)
    return found.energy[-1]


@CHECKS.add(world_size=2)
def a_source_that_dies_ends_the_figures_and_not_the_training(run: Run) -> str:
    whole = trained(run, "unmeasured", "--no-log-energy")
    assert whole.energy == [] and not any("watts" in row for row in whole.rows)
    source = Counter(run.runtime.rank, is_to_be_lost=run.runtime.rank == 1)
    found = trained(run, "lost", source=source)
    assert found.losses == whole.losses
    assert len(found.energy) == 1, "said once, and no sum"
    assert found.energy[0].startswith("energy: no more figures. rank 1: the power source was lost")
    assert "unplugged" in found.energy[0]
    assert not any("watts" in row for row in found.rows)
    return found.energy[0]


@CHECKS.add(world_size=2)
def one_rank_without_a_source_is_enough_for_no_figure(run: Run) -> str:
    from qwen2_ascend.errors import UserError
    from qwen2_ascend.telemetry.training_energy import require_power_source

    source = None if run.runtime.rank == 1 else Counter(0)
    found = trained(run, "none", source=source)
    assert found.energy == ["energy: not measured. rank 1: nothing here."]
    assert not any("watts" in row for row in found.rows)
    with powered(source):
        try:
            require_power_source(run.runtime)
        except UserError as error:
            refusal = str(error)
        else:
            raise AssertionError("not refused")
    assert refusal == "--log-energy: nothing measures energy here. rank 1: nothing here."
    return refusal


@CHECKS.add(world_size=2)
def profiling_changes_no_bit_and_writes_where_it_is_asked_to(run: Run) -> str:
    plain = trained(run, "plain", "--no-log-energy")
    traces = run.folder / "traces"
    flags = f"--no-log-energy --profile-steps 2:4 --profile-ranks 1 --profile-dir {traces}"
    found = trained(run, "profiled", flags)
    assert found.losses == plain.losses
    (trace,) = traces.iterdir()
    assert trace.name.startswith("rank1.")
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert len({name for name in names if name.startswith("ProfilerStep#")}) == 2
    assert sum("scaled_dot_product" in name for name in names) > 0
    return f"{len(names)} events"


if __name__ == "__main__":
    main(CHECKS)
