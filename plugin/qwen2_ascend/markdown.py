"""Tables as Markdown has them, to be read in a terminal and pasted into a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The lines of a table: a column for each word of `head`, a line for each of `rows`."""
    lines = [head, *rows]
    assert all(len(line) == len(head) for line in lines), lines
    first, *others = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([first, "|---" * len(head) + "|", *others])
