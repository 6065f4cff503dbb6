"""Tables for terminals, and as Markdown has them, to be pasted into a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The lines of a table: a column for each word of `head`, a line for each of `rows`."""
    lines = [head, *rows]
    assert all(len(line) == len(head) for line in lines), lines
    first, *others = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([first, "|---" * len(head) + "|", *others])


def aligned(rows: Sequence[Sequence[str]], flush: str = "lr") -> list[str]:
    """Lines whose cells stand below one another.

    Args:
        rows: rows of equal length.
        flush: for each column, l for flush left or r for flush right; the last letter holds for
            all columns after it.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = flush.ljust(len(widths), flush[-1])
    return [
        "  ".join(
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(row, widths, sides, strict=True)
        ).rstrip()
        for row in rows
    ]
