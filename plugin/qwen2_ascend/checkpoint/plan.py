"""The plan: which bytes of which source make up each target tensor. Pure; no file is opened here.

Source and target are both lists of *held* tensors, a stored tensor with the box of the model it
holds. A target's bytes are then the overlaps of its box with the sources' boxes. Splitting,
merging, resharding and loading one rank's parameters differ only in the two lists.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from qwen2_ascend.checkpoint.formats.stored import StoredTensor
from qwen2_ascend.checkpoint.rules import VOCABULARY, Box, TensorSlice


class PlanError(RuntimeError):
    """A plan that would not write every byte exactly once; a fault of ours, not the user's."""


class StoredSlice(NamedTuple):
    """A stored tensor, under the name its file gives it, and the box of the model it holds."""

    name: str
    piece: TensorSlice
    stored: StoredTensor


class Copy(NamedTuple):
    """`box` (in the coordinates of the tensor's view) comes out of `source`."""

    source: StoredSlice
    box: Box


@dataclass(frozen=True, kw_only=True)
class Write:
    """One target tensor and what fills it; what no copy covers is vocabulary padding, zero."""

    target: StoredSlice
    copies: tuple[Copy, ...]

    @property
    def is_padded(self) -> bool:
        return sum(volume(copy.box) for copy in self.copies) < volume(self.target.piece.box)

    @property
    def is_strided(self) -> bool:
        """Whether any copy is of columns, so that neither side is one run of bytes."""
        boxes = [self.target.piece.box, *(copy.source.piece.box for copy in self.copies)]
        return len({box[2] for box in boxes}) > 1

    @property
    def casts(self) -> bool:
        return any(c.source.stored.dtype != self.target.stored.dtype for c in self.copies)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every write, and the source tensors that should equal another one, bit for bit."""

    writes: tuple[Write, ...]
    replicas: tuple[tuple[StoredSlice, StoredSlice], ...]
    """(the copy that is read, its replica): norms on other TP ranks, a tied output embedding."""

    @property
    def num_bytes(self) -> int:
        return sum(write.target.stored.num_bytes for write in self.writes)


def make_plan(
    sources: Iterable[StoredSlice],
    targets: Sequence[StoredSlice],
    vocab_size: int,
    *,
    is_sparse: bool = False,
) -> Plan:
    """Plans how `sources` fill `targets`, and checks it.

    Args:
        sources: all source tensors; replicas are recognized by their equal boxes.
        targets: the tensors to fill: all of a model, or one rank's.
        vocab_size: rows of the vocabulary that are real; padding beyond them is never copied.
        is_sparse: whether a target may have elements that no source has.

    Raises:
        PlanError: a target byte has no source or two, or a source that is needed for no target.
    """
    by_tensor: dict[str, list[StoredSlice]] = defaultdict(list)
    replicas = []
    for held in sources:
        same = by_tensor[held.piece.tensor]
        twin = next((other for other in same if other.piece.box == held.piece.box), None)
        if twin is None:
            same.append(held)
        else:
            replicas.append((twin, held))
    writes = tuple(_plan_write(t, by_tensor[t.piece.tensor], vocab_size) for t in targets)
    for write in writes:
        _check_write(write, vocab_size, is_sparse)
    return Plan(writes=writes, replicas=tuple(replicas))


def check_all_used(plan: Plan, sources: Iterable[StoredSlice], vocab_size: int) -> None:
    """Raises PlanError unless every real byte of every source reaches a target.

    Only for a whole conversion; loading one rank leaves most of the model unread.
    """
    used: dict[StoredSlice, set[Box]] = defaultdict(set)
    for write in plan.writes:
        for copy in write.copies:
            used[copy.source].add(copy.box)
    replicas = {replica for _, replica in plan.replicas}
    for held in sources:
        real = clip(held.piece, vocab_size)
        if held in replicas or volume(real) == 0:
            continue
        if sum(map(volume, used[held])) < volume(real):
            raise PlanError(f"{held.stored.path}: {held.name} is not used in full")


def volume(box: Box) -> int:
    """Elements in a box; none where a range is empty or reversed."""
    return prod(max(0, stop - start) for start, stop in box)


def extent(box: Box) -> tuple[int, ...]:
    """How long a box is on each axis."""
    return tuple(stop - start for start, stop in box)


def overlap(one: Box, other: Box) -> Box:
    """The box common to both; its volume is 0 where there is none."""
    return tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))


def clip(piece: TensorSlice, vocab_size: int) -> Box:
    """The piece's box without vocabulary padding."""
    if piece.tensor not in VOCABULARY:
        return piece.box
    blocks, rows, columns = piece.box
    return (blocks, (rows[0], min(rows[1], vocab_size)), columns)


def bands(box: Box, max_elements: int) -> Iterator[Box]:
    """Cuts a box, in row-major order, into boxes of whole rows and at most `max_elements`.

    A row longer than that is one band.
    """
    (b0, b1), (r0, r1), columns = box
    step = max(1, max_elements // max(1, columns[1] - columns[0]))
    for block in range(b0, b1):
        for row in range(r0, r1, step):
            yield ((block, block + 1), (row, min(row + step, r1)), columns)


def _plan_write(target: StoredSlice, sources: Sequence[StoredSlice], vocab_size: int) -> Write:
    real = clip(target.piece, vocab_size)
    copies = (Copy(held, overlap(held.piece.box, real)) for held in sources)
    return Write(target=target, copies=tuple(c for c in copies if volume(c.box)))


def _check_write(write: Write, vocab_size: int, is_sparse: bool) -> None:
    boxes = [copy.box for copy in write.copies]
    twice = any(volume(overlap(a, b)) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    expected = volume(clip(write.target.piece, vocab_size))
    if twice or (sum(map(volume, boxes)) != expected and not is_sparse):
        found = "written twice" if twice else f"{sum(map(volume, boxes))} of {expected} elements"
        raise PlanError(f"{write.target.stored.path}: {write.target.name}: {found}")
