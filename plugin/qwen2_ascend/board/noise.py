"""How far two equal runs are apart, and where a third one is further.

Two runs of the same job differ by the order of sums and by the seed. Half their distance, averaged
over a window, is the noise band around their mean. A run whose curve leaves the band BAND times
wider differs by more than such a pair does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qwen2_ascend.board.metrics import Point

BAND = 3.0
"""How many times the pair's own deviation still counts as noise."""
WINDOW = 0.05
"""Share of the band's length over which deviations are averaged."""
PLACES = 400
"""Iterations at which curves are compared."""


class Band(NamedTuple):
    """The noise of a pair."""

    iterations: list[float]
    middle: list[float]
    width: list[float]
    """What the curve of an equal run may differ from the middle by."""


class Outside(NamedTuple):
    """How a third run lies to a band."""

    share: float
    """How much of the iterations that it shares with the band lies outside of the band."""
    since: float | None
    """The iteration from which on it stays outside; None where it ends inside."""


def noise_band(first: Sequence[Point], second: Sequence[Point]) -> Band | None:
    """The band of two equal runs, or None where they have no iterations in common."""
    places = _shared(first, second)
    if places is None:
        return None
    a, b = _at(first, places), _at(second, places)
    # two draws differ by sqrt(2) deviations; each is off their mean by half the difference
    squares = (a - b) ** 2 / 2
    # np.convolve gives as many values as the longer of its arguments has
    reach = min(max(1, round(WINDOW * len(places))), (len(places) - 1) // 2)
    kernel = np.ones(2 * reach + 1)
    weights = np.convolve(np.ones(len(places)), kernel, "same")
    deviation = np.sqrt(np.convolve(squares, kernel, "same") / weights)
    return Band(places.tolist(), ((a + b) / 2).tolist(), (BAND * deviation).tolist())


def outside(band: Band, curve: Sequence[Point]) -> Outside | None:
    """How a run lies to a band, or None where they have no iterations in common."""
    x = np.array(band.iterations)
    if not curve:
        return None
    inside = (x >= curve[0].iteration) & (x <= curve[-1].iteration)
    if not inside.any():
        return None
    places = x[inside]
    distance = np.abs(_at(curve, places) - np.array(band.middle)[inside])
    out = distance > np.array(band.width)[inside]
    returned = np.flatnonzero(~out)
    first_out = int(returned[-1]) + 1 if len(returned) else 0
    since = float(places[first_out]) if first_out < len(places) else None
    return Outside(float(out.mean()), since)


def _shared(first: Sequence[Point], second: Sequence[Point]) -> np.ndarray | None:
    """Iterations that both have, at most PLACES of them."""
    if not first or not second:
        return None
    begin = max(first[0].iteration, second[0].iteration)
    end = min(first[-1].iteration, second[-1].iteration)
    if end <= begin:
        return None
    own = sorted({p.iteration for p in (*first, *second) if begin <= p.iteration <= end})
    step = -(-len(own) // PLACES)
    return np.array(own[::step], dtype=np.float64)


def _at(curve: Sequence[Point], places: np.ndarray) -> np.ndarray:
    """A curve's means at some iterations, by straight lines between its points."""
    return np.interp(places, [p.iteration for p in curve], [p.mean for p in curve])
