"""Results as rows, and their table."""

from __future__ import annotations

from typing import Any

from qwen2_ascend import markdown

Rows = list[dict[str, Any]]


def table(rows: Rows) -> str:
    """The rows in Markdown."""
    head = ("task", "metric", "value", "stderr", "samples")
    return markdown.table(head, ([_cell(row.get(name)) for name in head] for row in rows))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
