"""Context parallelism as arithmetic: who attends to what.

A rank holds the positions of each row that `sequence_ranges` says. A document is cut where those
are. Of the documents that reach into a chunk of queries from before, there is one at most, and the
chunk's queries of it see all of its earlier keys. So only the attention of a chunk to itself is
causal.

Letters: `s` tokens of a whole row, `b` rows, `ng` query groups of a rank.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from qwen2_ascend.ops.blocks import Block
from qwen2_ascend.parallel import sequence_ranges

RING, ULYSSES, GATHER = "megatron_cp_algo", "ulysses_cp_algo", "kvallgather_cp_algo"

Launch = tuple[Block, ...]
"""The blocks of one call of the operator."""


class Documents(NamedTuple):
    """Where the documents of some rows end, the same in each of them."""

    rows: range
    ends: tuple[int, ...]
    """The ends, counted from the row's start."""

    def within(self, positions: range) -> Iterator[range]:
        """Each document's positions that are in `positions`, and in front of it."""
        for n in range(bisect_right(self.ends, positions.start), len(self.ends)):
            start = self.ends[n - 1] if n else 0
            if start >= positions.stop:
                return
            yield range(start, min(self.ends[n], positions.stop))


def _documents(s: int, b: int, ends: Sequence[int] | None) -> list[Documents]:
    """Those of all rows together where each is one document, else those of each row."""
    if ends is None:
        return [Documents(range(b), (s,))]
    own: list[list[int]] = [[] for _ in range(b)]
    for end in ends:
        own[(end - 1) // s].append((end - 1) % s + 1)
    return [Documents(range(row, row + 1), tuple(found)) for row, found in enumerate(own)]


@lru_cache(maxsize=16)
def ring_launches(
    s: int, b: int, cp: int, rank: int, ends: tuple[int, ...] | None
) -> tuple[Launch, ...]:
    """What a rank computes at each step of the ring, an empty launch where there is nothing.

    At step n it holds the keys of rank `rank - n`. Queries and keys are counted in those that
    either rank holds.
    """
    documents = _documents(s, b, ends)
    chunks = sequence_ranges(s, cp, rank, RING)
    steps = [tuple(_own(documents, chunks))]
    for n in range(1, cp):
        held = sequence_ranges(s, cp, (rank - n) % cp, RING)
        steps.append(tuple(_joined(_others(documents, chunks, held))))
    return tuple(steps)


def _own(documents: list[Documents], chunks: tuple[range, ...]) -> Iterator[Block]:
    """A rank's queries to its own keys: ordinary attention, for a document that goes from one of
    its chunks into the other leaves out nothing that the rank holds."""
    for rows, ends in documents:
        start = 0
        for stop in (_held(chunks, range(end)).stop for end in ends):
            if stop > start:
                yield Block(rows, range(start, stop), range(start, stop), True)
            start = stop


def _others(
    documents: list[Documents], chunks: tuple[range, ...], held: tuple[range, ...]
) -> Iterator[Block]:
    """A rank's queries to the keys that another rank holds."""
    for group in documents:
        for chunk in chunks:
            document = next(group.within(chunk))
            keys = _held(held, range(document.start, chunk.start))
            if keys:
                queries = _held(chunks, range(chunk.start, document.stop))
                yield Block(group.rows, queries, keys, False)


def _joined(blocks: Iterator[Block]) -> Iterator[Block]:
    """The same, where blocks of neighbouring queries with the same keys are one."""
    last: Block | None = None
    for block in blocks:
        if (
            last
            and last.queries.stop == block.queries.start
            and last == block._replace(queries=last.queries)
        ):
            last = block._replace(queries=range(last.queries.start, block.queries.stop))
            continue
        if last:
            yield last
        last = block
    if last:
        yield last


@lru_cache(maxsize=16)
def gathered_launches(
    s: int, b: int, cp: int, rank: int, ends: tuple[int, ...] | None
) -> tuple[Launch, ...]:
    """What a rank computes that has the keys of whole rows: each of its chunks to all before it."""
    documents = _documents(s, b, ends)
    chunks = sequence_ranges(s, cp, rank, GATHER)
    return tuple(
        tuple(
            Block(
                group.rows,
                _held(chunks, range(max(keys.start, chunk.start), keys.stop)),
                keys,
                True,
            )
            for group in documents
            for keys in group.within(chunk)
        )
        for chunk in chunks
    )


def _held(chunks: Sequence[range], positions: range) -> range:
    """The places of those of `positions` that a rank with these chunks holds."""
    places: list[int] = []
    before = 0
    for chunk in chunks:
        start, stop = max(chunk.start, positions.start), min(chunk.stop, positions.stop)
        if start < stop:
            places += before + start - chunk.start, before + stop - chunk.start
        before += len(chunk)
    return range(places[0], places[-1]) if places else range(0)


def ulysses_repeats(ng: int, cp: int) -> int:
    """How often each query group's keys are repeated so that every rank gets as many.

    The query heads that cp divides are then as many for each of them.
    """
    return cp // math.gcd(ng, cp)
