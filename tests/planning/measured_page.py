"""docs/planning.md's table of errors, and its picture of predicted against measured figures.

    PYTHONPATH=plugin:tests python -m planning.measured_page

writes both; `test_measured.py` fails where they are not what this makes.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from planning.measured import TimedRow, memory_rows, timed_rows
from qwen2_ascend import markdown
from qwen2_ascend.planning.fitting import Measured, fit_rates
from qwen2_ascend.planning.roofline import step_time

DOCS = Path(__file__).parents[2] / "docs"
PAGE, PICTURE = DOCS / "planning.md", DOCS / "planning.png"
BEGIN, END = "<!-- errors: made by tests/planning/measured_page.py -->", "<!-- end of errors -->"
KINDS = {"npu": "910B", "cuda": "GPU"}
FIGURES = {"rest": "memory at rest", "peak": "peak memory", "time": "time of a step"}


class Point(NamedTuple):
    """A figure that was measured, and the planner's."""

    row: str
    kind: str
    figure: str
    measured: float
    """Bytes or seconds."""
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def points() -> list[Point]:
    """All of them."""
    return [*_memory(), *(point for kind in KINDS for point in times(kind))]


def _memory() -> Iterator[Point]:
    for row in memory_rows():
        for figure, pair in (("rest", row.rest), ("peak", row.peak)):
            if pair:
                yield Point(row.name, row.kind, figure, *pair)


def times(kind: str) -> Iterator[Point]:
    """One for each row of a kind, predicted by rates that are fitted to the others."""
    found = [row for row in timed_rows() if row.kind == kind]
    for row in found:
        rates = fit_rates(as_steps([other for other in found if other is not row]))
        time = step_time(row.cut, row.device, rates, devices_per_node=row.devices_per_node)
        yield Point(row.name, kind, "time", row.seconds, time.total)


def as_steps(found: Sequence[TimedRow]) -> list[Measured]:
    """Rows as the fit takes them."""
    return [Measured(row.cut, row.device, row.devices_per_node, row.seconds) for row in found]


def table(found: Sequence[Point]) -> str:
    """The errors by kind, in Markdown."""
    rows = []
    for figure, title in FIGURES.items():
        for kind, name in KINDS.items():
            some = [point for point in found if (point.figure, point.kind) == (figure, kind)]
            if some:
                rows.append((title, name, *_cells(some)))
    head = ("figure", "of", "figures (rows)", "within 10%", "within 20%", "median", "worst")
    return markdown.table(head, rows)


def _cells(some: Sequence[Point]) -> tuple[str, ...]:
    sizes = [abs(point.error) for point in some]
    errors = [point.error for point in some]
    within = (str(sum(size <= bound for size in sizes)) for bound in (0.1, 0.2))
    rows = len({point.row for point in some})
    ends = f"{min(errors):+.1%}, {max(errors):+.1%}"
    return (f"{len(some)} ({rows})", *within, f"{statistics.median(sizes):.1%}", ends)


def with_table(page: str, found: Sequence[Point]) -> str:
    """The page with its table made anew."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table(found)}\n{END}{after}"


def draw(found: Sequence[Point], path: Path) -> None:
    """Memory on the left, seconds on the right, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.8), layout="constrained")
    memory, time = figure.subplots(1, 2)
    panels = (
        (memory, ("rest", "peak"), 2**30, "GiB", 0.1),
        (time, ("time",), 1.0, "seconds of a step", 0.2),
    )
    for axes, figures, unit, name, band in panels:
        some = [point for point in found if point.figure in figures]
        _panel(axes, some, unit, band)
        axes.set_xlabel(f"measured, {name}")
        axes.set_ylabel(f"predicted, {name}")
    memory.set_title("Memory of a rank", fontsize=11)
    time.set_title("Time of a step, each row predicted from the others", fontsize=11)
    figure.savefig(path, dpi=110, metadata={"Software": None})


MARKS = {"rest": "s", "peak": "o", "time": "o"}
COLOURS = {"npu": "#c4534a", "cuda": "#4878a8"}


def _panel(axes: Any, found: Sequence[Point], unit: float, band: float) -> None:
    values = [value / unit for point in found for value in (point.measured, point.predicted)]
    ends = [min(values) / 1.3, max(values) * 1.3]
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.fill_between(
        ends,
        [end * (1 - band) for end in ends],
        [end * (1 + band) for end in ends],
        color="#dddddd",
        label=f"within {band:.0%}",
        linewidth=0,
    )
    for figure in dict.fromkeys(point.figure for point in found):
        for kind, name in KINDS.items():
            some = [point for point in found if (point.figure, point.kind) == (figure, kind)]
            if not some:
                continue
            axes.scatter(
                [point.measured / unit for point in some],
                [point.predicted / unit for point in some],
                s=22,
                marker=MARKS[figure],
                facecolors="none" if figure == "rest" else COLOURS[kind],
                edgecolors=COLOURS[kind],
                label=f"{name}, {FIGURES[figure]}",
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(ends)
    axes.set_ylim(ends)
    axes.set_aspect("equal")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    made = points()
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), made), encoding="utf-8")
    draw(made, PICTURE)
    print(table(made))
