"""The heat map of layers and sublayers, and the loss curve, as PNG; needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from qwen2_ascend.alignment.judge import Finding, Judgement
from qwen2_ascend.alignment.sublayers import EMBEDDING, FINAL_NORM, LAYER, LOGITS, LOSS, full_name
from qwen2_ascend.figures import new_figure, png, with_grid

OUTER = (EMBEDDING, FINAL_NORM, LOGITS, LOSS)
Grid = Sequence[Sequence[str]]
"""The sublayers of a map, row by row."""
DARK = "#222222"
FAULT = "#c1121f"
TITLES = (
    "Own error of each sublayer, in units of the noise",
    "Error of the whole model up to there",
)


def heat_map_png(judgement: Judgement) -> bytes:
    """Two maps side by side: each sublayer's own error over the noise, and the whole model's error.

    Rows are layers, columns sublayers; what is outside the layers stands below.
    """
    num_layers = judgement.record.config.num_layers
    figure = new_figure(15, max(5.6, 3.6 + 0.24 * num_layers))
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.12)  # type: ignore[union-attr]
    rows = figure.subplots(
        2, 2, height_ratios=(max(num_layers, 5), max(0.8, 0.05 * num_layers)), squeeze=False
    )
    names: tuple[Grid, Grid] = (
        [[full_name(n, x.name) for x in LAYER] for n in range(num_layers)],
        [OUTER],
    )
    ratios = _Map(_log_ratio, *_ratio_colours(judgement), "own error / noise")
    totals = _Map(_log_total, "viridis", _total_range(judgement), "error, relative")
    for column, values in enumerate((ratios, totals)):
        layers, outside = rows[:, column]
        image = _draw(layers, values, names[0], judgement)
        layers.set_title(TITLES[column], fontsize=11, color=DARK)
        layers.set_xticks(range(len(LAYER)), [x.label for x in LAYER], rotation=40, ha="right")
        layers.set_yticks(range(0, num_layers, max(1, num_layers // 32)))
        layers.set_ylabel("layer")
        _draw(outside, values, names[1], judgement)
        outside.set_xticks(range(len(OUTER)), ["embedding", "final norm", "logits", "loss"])
        outside.set_yticks([])
        bar = figure.colorbar(image, ax=rows[:, column], fraction=0.03, pad=0.01)
        _label(bar, values, judgement.noise_factor if column == 0 else None)
    for axes, grid in zip(rows[:, 0], names, strict=True):
        _mark(axes, grid, judgement)
    color = DARK if judgement.aligned else FAULT
    figure.suptitle(_title(judgement), fontsize=14, fontweight="bold", color=color)
    return png(figure)


class _Map(NamedTuple):
    """What a colour is made of."""

    value: Callable[[Finding], float]
    colours: str
    norm: Any
    label: str


def _log_ratio(finding: Finding) -> float:
    return math.log10(min(max(finding.ratio, 1e-2), 1e12))


def _log_total(finding: Finding) -> float:
    error = finding.total.mean if finding.total is not None else 0.0
    return math.log10(min(max(error, 1e-18), 1e3))


def _ratio_colours(judgement: Judgement) -> tuple[str, Any]:
    """Blue below the limit, white at it, red above; a fault is red however large others are."""
    limit = math.log10(judgement.noise_factor)
    top = max(max(map(_log_ratio, judgement.findings)), limit + 0.5)
    return "RdBu_r", TwoSlopeNorm(vcenter=limit, vmin=-1.0, vmax=min(top, limit + 4))


def _total_range(judgement: Judgement) -> Any:
    found = [_log_total(finding) for finding in judgement.findings]
    found = [value for value in found if value > -18] or [-18.0]
    low, high = math.floor(min(found)), math.ceil(max(found))
    return Normalize(low, max(high, low + 1))


def _draw(axes: Any, values: _Map, names: Grid, judgement: Judgement) -> Any:
    by_name = {finding.name: values.value(finding) for finding in judgement.findings}
    grid = [[by_name[name] for name in row] for row in names]
    image = axes.imshow(grid, aspect="auto", cmap=values.colours, norm=values.norm)
    _tidy(axes, len(names[0]), len(names))
    return image


def _tidy(axes: Any, columns: int, rows: int) -> None:
    """White lines between the cells."""
    axes.tick_params(length=0, labelsize=9, colors=DARK)
    axes.set_xticks([x - 0.5 for x in range(1, columns)], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, rows)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _label(bar: Any, values: _Map, limit: float | None) -> None:
    low, high = math.ceil(values.norm.vmin), math.floor(values.norm.vmax)
    step = max(1, (high - low) // 8)
    ticks = list(range(low, high + 1, step))
    names = [f"$10^{{{tick}}}$" if tick not in (0, 1) else str(10**tick) for tick in ticks]
    if limit is not None:
        at = math.log10(limit)
        kept = [i for i, tick in enumerate(ticks) if abs(tick - at) > 0.25]
        ticks, names = [ticks[i] for i in kept] + [at], [names[i] for i in kept]
        names.append(f"{limit:g} (limit)")
    bar.set_ticks(ticks, labels=names)
    bar.set_label(values.label, fontsize=9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9)


def _mark(axes: Any, names: Grid, judgement: Judgement) -> None:
    """A cross in every cell that parts, a frame around the first."""
    places = {name: (x, y) for y, row in enumerate(names) for x, name in enumerate(row)}
    for finding in judgement.parted:
        if finding.name not in places:
            continue
        column, row = places[finding.name]
        style = {"ha": "center", "fontweight": "bold"}
        axes.text(column, row, "x", va="center", color="white", fontsize=11, **style)
        if finding is judgement.first:
            box = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="black")
            box.set(linewidth=2.5, zorder=5, clip_on=False)
            axes.add_patch(box)
            axes.annotate(
                "first",
                (column, row - 0.5),
                (0, 10),
                textcoords="offset points",
                fontsize=10,
                color=DARK,
                bbox={"boxstyle": "round,pad=0.2", "fc": "white", "ec": DARK},
                **style,
            )


def _title(judgement: Judgement) -> str:
    layout = judgement.record.origin.split(";")[0]
    first = judgement.first
    if first is not None:
        return f"Parted first at {first.place}   ({layout})"
    return f"{'Aligned' if judgement.aligned else 'Parted'}   ({layout})"


def curve_png(judgement: Judgement) -> bytes:
    """A picture of both losses above and of their difference against noise below."""
    steps = judgement.steps
    figure = new_figure(8, 5)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    numbers = [step.step for step in steps]
    broad = {"color": "tab:gray", "linewidth": 4, "alpha": 0.5}
    above.plot(numbers, [x.reference for x in steps], label="transformers + AdamW", **broad)
    above.plot(numbers, [x.loss for x in steps], color="tab:blue", linewidth=1.3, label="this run")
    above.set_ylabel("loss (nats per token)")
    above.legend(frameon=False)
    dots = {"color": "tab:blue", "marker": "o", "markersize": 3}
    differences = _visible([abs(x.loss - x.reference) for x in steps])
    below.plot(numbers, differences, label="difference", **dots)
    limit = judgement.noise_factor
    limits = _visible([limit * x.noise for x in steps])
    below.plot(numbers, limits, color=FAULT, linestyle="--", label=f"{limit:g} x noise")
    below.set_yscale("log")
    below.set_ylabel("difference")
    below.set_xlabel("step")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    below.legend(frameon=False)
    with_grid(above, below)
    return png(figure)


def _visible(values: Sequence[float]) -> list[float]:
    """The values without zeros, which a logarithmic axis cannot show."""
    return [max(value, 1e-12) for value in values]
