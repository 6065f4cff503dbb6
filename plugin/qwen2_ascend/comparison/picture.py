"""A comparison as a picture: all arrays at a glance, and the worst one in detail."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen2_ascend.comparison.compare import Comparison, Report
from qwen2_ascend.comparison.statistics import difference_histogram
from qwen2_ascend.comparison.text import number
from qwen2_ascend.comparison.tolerances import cosine_text
from qwen2_ascend.errors import UserError
from qwen2_ascend.figures import new_figure, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AGREES, DIFFERS, REFERENCE = "#2b6f9e", "#c8452e", "#888888"
MAX_DOTS = 20_000
"""The most dots of the scatter, drawn by chance from all elements."""
MAX_LABELS = 60
"""Names below the bars; more would not be read."""


def draw(report: Report, path: Path, name: str | None = None) -> None:
    """Writes the picture of `report`.

    Args:
        report: what `compare` returned; the files of one array are read again.
        path: the PNG.
        name: the array to show in detail; the worst without it.

    Raises:
        UserError: `path` cannot be written.
        ImportError: matplotlib is not installed.
    """
    shown = _chosen(report, name)
    many = len(report.comparisons) > 1
    figure = new_figure(15, 9 if many else 5.2)
    grid = figure.add_gridspec(2 if many else 1, 3)
    if many:
        _draw_overview(figure.add_subplot(grid[0, :]), report, shown)
    if shown is None:
        what = "nothing" if name is None else f"{name}: nothing"
        figure.text(0.5, 0.25, f"{what} could be compared", ha="center", color=DIFFERS)
    else:
        _draw_details([figure.add_subplot(grid[-1, i]) for i in range(3)], shown)
    _title(figure, report)
    try:
        path.write_bytes(png(figure))
    except OSError as error:
        raise UserError(f"--png {path}: cannot be written: {error.strerror or error}.") from None


def _chosen(report: Report, name: str | None) -> Comparison | None:
    compared = [c for c in report.comparisons if c.difference is not None]
    if name is not None:
        return next((c for c in compared if c.name == name), None)
    return max(compared, key=_badness, default=None)


def _badness(comparison: Comparison) -> tuple[bool, float]:
    assert comparison.difference is not None
    return not comparison.passed, comparison.difference.tolerance_used


def _title(figure: Figure, report: Report) -> None:
    failed = len(report.failed)
    verdict = f"{failed} of {len(report.comparisons)} arrays fail" if failed else "all agree"
    figure.suptitle(
        f"ours {report.ours}   against   theirs {report.theirs}:   {verdict}",
        color=DIFFERS if failed else AGREES,
        fontsize=11,
    )


# -- all arrays


def _draw_overview(axes: Axes, report: Report, shown: Comparison | None) -> None:
    """One bar per array: how much of its tolerance the worst element takes."""
    comparisons = report.comparisons
    heights = [c.difference.tolerance_used if c.difference else np.nan for c in comparisons]
    finite = [h for h in heights if np.isfinite(h) and h > 0]
    low, high = min([*finite, 0.1]) / 3, max([*finite, 1.0]) * 3
    colors = [_color(c) for c in comparisons]
    # a stub for what is equal, so that it is seen to have been compared
    bars = [high if h == np.inf else max(h, low * 1.1) for h in heights]
    places = np.arange(len(bars))
    axes.bar(places, [b - low for b in bars], bottom=low, color=colors, width=0.8)
    for place, height in zip(places, heights, strict=True):
        if np.isnan(height):
            axes.text(
                float(place), low * 1.3, "not compared", rotation=90, color=DIFFERS, fontsize=7,
                ha="center", va="bottom",
            )  # fmt: skip
    axes.axhline(1.0, color=REFERENCE, linestyle="--", linewidth=1)
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.set_xlim(-0.6, len(bars) - 0.4)
    step = -(-len(bars) // MAX_LABELS)
    labels = [_tail(c.name, 34) for c in comparisons][::step]
    axes.set_xticks(places[::step], labels, rotation=60, ha="right", rotation_mode="anchor")
    axes.tick_params(axis="x", labelsize=7)
    for label, comparison in zip(axes.get_xticklabels(), comparisons[::step], strict=True):
        if shown is not None and comparison.name == shown.name:
            label.set_fontweight("bold")
    axes.set_ylabel("worst element / its tolerance")
    axes.set_title("all arrays: above the line an element is beyond its tolerance; red fails")


def _tail(name: str, length: int) -> str:
    return name if len(name) <= length else "…" + name[1 - length :]


# -- one array


def _draw_details(axes: list[Axes], comparison: Comparison) -> None:
    arrays = comparison.pair.load()
    assert arrays is not None
    _draw_histogram(axes[0], comparison, *arrays)
    _draw_cosines(axes[1], comparison)
    _draw_scatter(axes[2], comparison, *arrays)


def _draw_histogram(
    axes: Axes, comparison: Comparison, ours: np.ndarray, theirs: np.ndarray
) -> None:
    found = comparison.difference
    assert found is not None
    counts, edges = difference_histogram(ours, theirs)
    axes.stairs(counts, edges, fill=True, color=_color(comparison))
    if counts.any():
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7)
    axes.axvline(0, color=REFERENCE, linewidth=0.8)
    axes.set_xlabel("ours - theirs")
    axes.set_ylabel("elements")
    _label(
        axes,
        f"{_tail(comparison.name, 44)}: difference",
        f"MaxAbsErr {number(found.max_abs)}, mean {number(found.mean)}, std {number(found.std)}",
    )


def _draw_cosines(axes: Axes, comparison: Comparison) -> None:
    found, limits = comparison.difference, comparison.tolerances
    assert found is not None and limits is not None
    away = 1 - found.cosines
    floor = min(away[away > 0].min(initial=1e-12), 1e-3) / 10
    size = 7 if away.size < 10 else 4 if away.size < 1000 else 2
    rows, exact = np.arange(away.size), away == 0
    style: dict[str, Any] = {"color": _color(comparison), "markersize": size, "linestyle": ""}
    axes.plot(rows[~exact], away[~exact], marker="o", markeredgewidth=0, **style)
    axes.plot(rows[exact], np.full(exact.sum(), floor), marker="v", fillstyle="none", **style)
    axes.set_yscale("log")
    high = max(away.max(initial=floor), 1 - limits.min_cosine if limits.min_cosine > -1 else 0)
    axes.set_ylim(floor / 3, high * 5)
    if limits.min_cosine > -1 and limits.min_cosine < 1:
        axes.axhline(1 - limits.min_cosine, color=REFERENCE, linestyle="--", linewidth=1)
        axes.annotate(
            " tolerance", (0, 1 - limits.min_cosine), xycoords=("axes fraction", "data"),
            ha="left", va="bottom", fontsize=8, color=REFERENCE,
        )  # fmt: skip
    axes.set_xlabel("row (position)")
    axes.set_ylabel("1 - cosine")
    hollow = ", hollow: exactly 1" if exact.any() else ""
    figures = f"min {cosine_text(found.cosine_min)}, mean {cosine_text(found.cosine_mean)}"
    _label(axes, "cosine by position", figures + hollow)


def _draw_scatter(axes: Axes, comparison: Comparison, ours: np.ndarray, theirs: np.ndarray) -> None:
    found = comparison.difference
    assert found is not None
    x, y = _sample(theirs), _sample(ours)
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    axes.scatter(x, y, s=4, alpha=0.35, linewidths=0, color=_color(comparison), rasterized=True)
    if x.size:
        low, high = min(x.min(), y.min()), max(x.max(), y.max())
        axes.plot([low, high], [low, high], color=REFERENCE, linewidth=0.8, zorder=0)
    worst = ""
    if found.max_abs:
        axes.plot([found.worst_theirs], [found.worst_ours], "x", color="black")
        worst = f", the cross is the worst, {list(found.worst)}"
    axes.set_xlabel("theirs")
    axes.set_ylabel("ours")
    drawn = f"{x.size:,} of {ours.size:,}" if x.size < ours.size else "all elements"
    _label(axes, "element by element", drawn + worst)


def _sample(array: np.ndarray) -> np.ndarray:
    """The same elements of every array of one shape, fp64."""
    if array.size <= MAX_DOTS:
        return np.asarray(array).reshape(-1).astype(np.float64)
    random = np.random.default_rng(0)
    places = tuple(random.integers(0, n, MAX_DOTS) for n in array.shape)
    return array[places].astype(np.float64)


def _color(comparison: Comparison) -> str:
    return AGREES if comparison.passed else DIFFERS


def _label(axes: Axes, title: str, figures: str) -> None:
    axes.set_title(f"{title}\n", fontsize=11)
    axes.text(0.5, 1.02, figures, transform=axes.transAxes, ha="center", va="bottom", fontsize=8)
