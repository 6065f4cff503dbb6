"""Fits `Rates` to measured steps: the constants in devices.py, or those of somebody's machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from qwen2_ascend.planning.devices import Device, Rates
from qwen2_ascend.planning.job import RunLayout
from qwen2_ascend.planning.roofline import Work, step_work

NUMBERS = tuple(name for name in Rates.__dataclass_fields__ if name != "source")
PRIOR = Rates(
    products=0.85,
    attention=0.4,
    memory=0.4,
    links=0.7,
    layer_seconds=2e-3,
    step_seconds=30e-3,
    source="what one would guess",
)
_NOISE = 0.1
"""Relative, of a measured step; the same run measured twice by others differs by up to 14%."""
_FREEDOM = 0.5
"""By what factor, as a logarithm, a rate may easily be another than where the search begins."""


class Measured(NamedTuple):
    """A step that was timed."""

    cut: RunLayout
    device: Device
    devices_per_node: int
    seconds: float


def fit_rates(steps: Sequence[Measured], prior: Rates = PRIOR, *, source: str = "") -> Rates:
    """The rates at which the predicted steps come nearest to the measured ones.

    The error is the logarithm of predicted over measured, and a large one counts less than its
    square (soft L1). What few steps do not determine stays near `prior`.

    Args:
        steps: at least one.
        prior: where the search begins.
        source: says where the measurements are from.
    """
    works = [step_work(s.cut, s.device, prior, s.devices_per_node)[0] for s in steps]
    measured = np.log([s.seconds for s in steps])
    begin = np.log([getattr(prior, name) for name in NUMBERS])
    # no rate but the seconds can be above the peak
    most = np.where([name.endswith("seconds") for name in NUMBERS], np.inf, 0.0)
    found = begin
    for _ in range(30):
        errors, slopes = _linearized(works, measured, found)
        weights = (1 + (errors / _NOISE) ** 2) ** -0.25 / _NOISE
        left = np.vstack([slopes * weights[:, None], np.eye(len(found)) / _FREEDOM])
        right = np.concatenate([-errors * weights, (begin - found) / _FREEDOM])
        step = np.linalg.lstsq(left, right, rcond=None)[0]
        found = np.minimum(found + np.clip(step, -0.5, 0.5), most)
    values = dict(zip(NUMBERS, np.exp(found).tolist(), strict=True))
    return replace(prior, **values, source=source)


def fit_machine(steps: Sequence[Measured], prior: Rates, *, source: str) -> Rates:
    """Fits as `fit_rates` does, for a machine of which only these steps are known.

    First all rates of `prior` are scaled alike, as far as the peaks allow, until half of the steps
    are predicted too long and half too short. From there each may go its own way, but not far.
    """
    works = [step_work(s.cut, s.device, prior, s.devices_per_node)[0] for s in steps]
    slower = float(
        np.median([s.seconds / w.seconds(prior) for s, w in zip(steps, works, strict=True)])
    )
    shares = {name: min(getattr(prior, name) / slower, 1.0) for name in NUMBERS[:4]}
    seconds = {name: getattr(prior, name) * slower for name in NUMBERS[4:]}
    return fit_rates(steps, replace(prior, **shares, **seconds), source=source)


def _linearized(
    works: Sequence[Work], measured: np.ndarray, logs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(errors `[n]`, their slopes `[n, rates]` by the rates' logarithms)."""
    rates = np.exp(logs)
    is_seconds = np.array([name.endswith("seconds") for name in NUMBERS])
    parts = np.array(works) * np.where(is_seconds, rates, 1 / rates)
    totals = parts.sum(axis=1)
    slopes = np.where(is_seconds, 1.0, -1.0) * parts / totals[:, None]
    return np.log(totals) - measured, slopes
