"""What a training log tells the planner: run.json the layout, metrics.jsonl how long steps took.

A run writes run.json beside metrics.jsonl when it begins (training/description.py). Its `starts`
have an entry for each time that the run was started or resumed, as a run may go on with another
layout.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError
from qwen2_ascend.files import json_value, open_regular, read_json
from qwen2_ascend.planning.devices import Device, Rates, device_called
from qwen2_ascend.planning.job import Job, RunLayout, Stack
from qwen2_ascend.planning.roofline import step_time

RUN_FILE = "run.json"
WARM_UP_STEPS = 1
"""Steps of each start that do not count: the first compiles operators and makes the state."""


class LoggedRun(NamedTuple):
    """Steps of one layout."""

    name: str
    cut: RunLayout
    device: Device
    devices_per_node: int
    seconds: float
    """Median of a step."""
    num_steps: int


def as_entry(cut: RunLayout, device_name: str, devices_per_node: int, first_iteration: int) -> dict:
    """What run.json says of a start.

    Args:
        cut: the planner's view of the run.
        device_name: as its driver names it; "cpu".
        devices_per_node: processes on each host.
        first_iteration: steps that were made before this start.
    """
    return {
        "first_iteration": first_iteration,
        "device": device_name,
        "devices_per_node": devices_per_node,
        "layout": asdict(cut),
    }


def with_start(
    file: Path, entry: dict[str, Any] | None, first_iteration: int
) -> list[dict[str, Any]]:
    """The starts that run.json tells of and a new one; what came after that one is dropped.

    Args:
        file: run.json, which need not be there.
        entry: what `as_entry` says of the new start; None where the planner does not know it. Its
            steps are then nobody's: without a word of it they would count as the start's before.
        first_iteration: steps that were made before it.
    """
    try:
        starts = read_json(file)["starts"]
        earlier = [one for one in starts if one["first_iteration"] < first_iteration]
    except (UserError, KeyError, TypeError):
        earlier = []  # there is none, or it was cut short by a kill
    return [*earlier, entry or {"first_iteration": first_iteration, "layout": None}]


def read_log(metrics: Path) -> list[LoggedRun]:
    """The layouts of a log that have at least one step after their first.

    Raises:
        UserError: the log or run.json beside it is not there, or says nothing of use.
    """
    beside = metrics.parent / RUN_FILE
    for file in (metrics, beside):
        if not file.is_file():
            raise UserError(
                f"--from-log {metrics}: there is no file {file}; a run writes metrics.jsonl and "
                f"{RUN_FILE} into --report-dir, or else into --save."
            )
    try:
        starts = read_json(beside)["starts"]
        steps = list(_steps(metrics))
        ends = [*(start["first_iteration"] for start in starts[1:]), float("inf")]
        found = [
            _run(f"{metrics} {start['first_iteration'] + 1}", start, steps, end)
            for start, end in zip(starts, ends, strict=False)
        ]
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"--from-log {metrics}: {beside} cannot be read: {error!r}.") from None
    runs = [run for run in found if run is not None]
    if not runs:
        raise UserError(f"--from-log {metrics}: it has no step after a first one.")
    return runs


def _run(
    name: str, start: dict[str, Any], steps: list[tuple[int, float, int]], end: float
) -> LoggedRun | None:
    if start["layout"] is None:
        return None
    begin = start["first_iteration"] + WARM_UP_STEPS
    # a line stands for the steps since the line before it
    mine = [
        (seconds, number) for at, seconds, number in steps if begin <= at - number and at <= end
    ]
    if not mine:
        return None
    device = device_called(start["device"])
    if device is None:
        raise UserError(f"--from-log: the planner does not know the device {start['device']}.")
    return LoggedRun(
        name,
        as_run_layout(start["layout"]),
        device,
        start["devices_per_node"],
        statistics.median(seconds for seconds, _ in mine),
        sum(number for _, number in mine),
    )


def _steps(metrics: Path) -> Iterator[tuple[int, float, int]]:
    """(iteration, seconds of a step, steps that they are the mean of) of each line."""
    rows: list[tuple[int, float | None]] = [(0, None)]
    with open_regular(metrics) as lines:
        for line in lines:
            try:
                row = json_value(line)
            except ValueError:
                continue  # cut short by a kill
            if isinstance(row, dict) and row.get("step_seconds"):
                rows.append((int(row["iteration"]), float(row["step_seconds"])))
    for (before, _), (at, seconds) in pairwise(rows):
        if seconds is not None and at > before:
            yield at, seconds, at - before


def as_run_layout(layout: dict[str, Any]) -> RunLayout:
    """What `asdict` made of a RunLayout, made one again."""
    job = dict(layout["job"])
    # rope's scaling costs nothing that is planned
    job["config"] = _made(Qwen2Config, {**job["config"], "yarn": None})
    job["stack"] = _made(Stack, job["stack"])
    return _made(RunLayout, {**layout, "job": _made(Job, job)})


def _made(kind: Any, values: dict[str, Any]) -> Any:
    names = {field.name for field in fields(kind)}
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names}
    return kind(**plain)


def rates_of(runs: Sequence[LoggedRun]) -> Rates:
    """What a machine reaches of its devices' peaks, by the steps of its logs.

    Few runs cannot tell all rates apart: those that they do not determine stay in the proportions
    that published runs have.
    """
    from qwen2_ascend.planning.fitting import PRIOR, Measured, fit_machine  # with numpy

    known = runs[0].device.rates
    prior = known if known.layer_seconds > 0 else PRIOR
    steps = [Measured(run.cut, run.device, run.devices_per_node, run.seconds) for run in runs]
    number = sum(run.num_steps for run in runs)
    layouts = f"{len(runs)} layout{'s' if len(runs) > 1 else ''}"
    return fit_machine(steps, prior, source=f"fitted to {number} steps of {layouts} of the log")


def table(runs: Sequence[LoggedRun], rates: Rates) -> list[str]:
    """Each layout of the logs: what it took, and what the fitted rates say."""
    lines = []
    for run in runs:
        fitted = step_time(run.cut, run.device, rates, devices_per_node=run.devices_per_node).total
        lines.append(
            f"{run.name}: {run.cut.label()}, micro-batch {run.cut.micro_batch_size}: "
            f"{run.seconds:.3g} s/step in {run.num_steps} steps; fitted {fitted:.3g} "
            f"({fitted / run.seconds - 1:+.0%})"
        )
    return lines


def same_machine(runs: Sequence[LoggedRun]) -> None:
    """Raises UserError where logs are of different devices."""
    names = dict.fromkeys(run.device.name for run in runs)
    if len(names) > 1:
        raise UserError(f"--from-log: the logs are of different devices: {', '.join(names)}.")


def asked_like(run: LoggedRun) -> Job:
    """The job of a run, as the search begins with it."""
    return replace(run.cut.job, stack=Stack())
