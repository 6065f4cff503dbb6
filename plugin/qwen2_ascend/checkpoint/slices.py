"""What one rank holds of a training state, as boxes of the mapping table's views; pure.

A rank's tensor is a box (`rules.TensorSlice`), but the distributed optimizer keeps a run of its
elements, start..stop of the flattened tensor, and data-parallel replicas share the writing in the
same way.
Such a run is a few boxes again. So a training state is written and read by the splitter's plan,
whatever the layouts are.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from itertools import accumulate
from typing import NamedTuple, TypeVar

from qwen2_ascend.checkpoint.rules import Box, TensorSlice

K = TypeVar("K", bound=Hashable)
P = TypeVar("P", bound=Hashable)


class Run(NamedTuple):
    """Elements start..stop of a box, flattened in row-major order."""

    start: int
    stop: int


class Part(NamedTuple):
    """A box that is one run of a larger box's elements."""

    box: Box
    run: Run


def parts_of(box: Box, run: Run, *, joins_blocks: bool) -> Iterator[Part]:
    """Cuts a run of a box's elements into boxes, in order; a run that is the whole box is one.

    Args:
        box: `[blocks, rows, columns]`.
        run: the run of its elements.
        joins_blocks: whether a box may be of several whole blocks.
    """
    (block0, _), (row0, row1), (column0, column1) = box
    columns = column1 - column0
    of_block = (row1 - row0) * columns
    position, stop = run
    while position < stop:
        block, in_block = divmod(position, of_block)
        row, column = divmod(in_block, columns)
        blocks, rows, across = 1, (row0, row1), (column0, column1)
        if in_block == 0 and stop - position >= of_block:
            blocks = (stop - position) // of_block if joins_blocks else 1
            size = blocks * of_block
        elif column == 0 and stop - position >= columns:
            count = min((stop - position) // columns, row1 - row0 - row)
            rows = (row0 + row, row0 + row + count)
            size = count * columns
        else:
            size = min(columns - column, stop - position)
            rows = (row0 + row, row0 + row + 1)
            across = (column0 + column, column0 + column + size)
        first = block0 + block
        yield Part(((first, first + blocks), rows, across), Run(position, position + size))
        position += size


def share_of(sizes: Mapping[K, int], replica: int, num_replicas: int) -> dict[K, Run]:
    """What one of several equal replicas writes: an equal part of all elements, end to end.

    Args:
        sizes: elements of every tensor, in an order that is the same on all replicas.
        replica: which one.
        num_replicas: how many there are.

    Returns:
        A run of each tensor that it writes any of.
    """
    total = sum(sizes.values())
    first, last = (total * r // num_replicas for r in (replica, replica + 1))
    runs = {}
    for (name, size), end in zip(sizes.items(), accumulate(sizes.values()), strict=True):
        start = end - size
        run = Run(max(first, start) - start, min(last, end) - start)
        if run.stop > run.start:
            runs[name] = run
    return runs


def owners(pieces: Mapping[P, Mapping[str, TensorSlice]]) -> dict[P, set[str]]:
    """The names of the tensors that each shard writes: of equal boxes the first one.

    Norms lie on every tensor-parallel rank, a tied embedding on the first stage and the last.
    """
    seen: set[tuple[str, Box]] = set()
    own: dict[P, set[str]] = {}
    for shard, tensors in pieces.items():
        own[shard] = set()
        for name, piece in tensors.items():
            if (piece.tensor, piece.box) not in seen:
                seen.add((piece.tensor, piece.box))
                own[shard].add(name)
    return own
