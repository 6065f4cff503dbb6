"""Tables for terminals, and as Markdown has them, to be pasted into a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The lines of a table: a column for each word of `head`, a line for each of `rows`."""
    lines = [head, *rows]
    assert all(len(line) == len(head) for line in lines), lines
    first, *others = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([first, "|---" * len(head) + "|", *others])


def aligned(rows: Sequence[Sequence[str]], right: bool = True) -> list[str]:
    """Lines whose cells stand below one another; the first column is flush left.

    Args:
        rows: rows of equal length.
        right: whether the other columns are flush right, as numbers want it.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if right and index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
