"""Figures as PNG, drawn without a display; matplotlib is imported when one is drawn."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 130


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; sizes are in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # which has no window, unlike pyplot's

    return Figure(figsize=(width, height), layout="constrained")


def png(figure: Figure) -> bytes:
    """The file of a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, format="png")
    return buffer.getvalue()


def without_box(*plots: Any) -> None:
    """Takes the upper and the right edge of each plot away."""
    for axes in plots:
        axes.spines[["top", "right"]].set_visible(False)


def with_grid(*plots: Any) -> None:
    """Gives each plot a pale grid instead of a box."""
    without_box(*plots)
    for axes in plots:
        axes.grid(alpha=0.3)


def report_faults(what: str, *modules: str) -> Iterator[str]:
    """The modules that `what` needs and that are not installed, for a message.

    Args:
        what: a flag, for example.
        modules: of the extra "report".
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            extra = "pip install 'qwen2-ascend[report]'"
            yield f"{what} needs {module}, which is not installed: {extra}."
