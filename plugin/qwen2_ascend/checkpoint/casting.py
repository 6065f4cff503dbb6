"""Casts numbers between dtypes and counts those that do not survive it.

A dtype with a narrower range turns large numbers into infinities and small ones into zeros. The
first ruin a model and are refused; the second are said.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np

from qwen2_ascend.checkpoint.formats.stored import NUMPY_DTYPES
from qwen2_ascend.checkpoint.plan import StoredSlice, volume
from qwen2_ascend.checkpoint.rules import Box
from qwen2_ascend.errors import UserError


class Lost(NamedTuple):
    """Numbers that a cast turned into something else."""

    infinite: int = 0
    """Finite ones that became infinite."""
    zero: int = 0
    """Others than zero that became zero."""


def assign(out: np.ndarray, values: np.ndarray) -> Lost:
    """Copies or casts (round to nearest even, as torch), and counts what the cast lost."""
    if out.dtype == values.dtype:
        # moved as plain integers: ml_dtypes' element-wise loops are slower, and NaNs stay as is
        raw = np.dtype(f"u{out.dtype.itemsize}")
        out.view(raw)[...] = values.view(raw)
        return Lost()
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        out[...] = values.astype(out.dtype)
    return _lost(out, values) if _is_narrower(out.dtype, values.dtype) else Lost()


class CastLosses:
    """What a reader's casts lost, by source tensor. Threads may share one.

    A box that is read twice (a replica on another rank, a tied embedding) counts once.
    """

    def __init__(self, way_out: str = "", *, allow_overflow: bool = False) -> None:
        """Nothing is lost yet.

        Args:
            way_out: ends the message about an overflow.
            allow_overflow: whether `check` accepts numbers that became infinite.
        """
        self._way_out, self._allow_overflow = way_out, allow_overflow
        self._lost: dict[StoredSlice, dict[Box, Lost]] = defaultdict(dict)
        self._lock = threading.Lock()
        self._dtypes: set[str] = set()

    def __contains__(self, source: StoredSlice) -> bool:
        with self._lock:
            return source in self._lost

    def add(self, source: StoredSlice, box: Box, lost: Lost, dtype: np.dtype) -> None:
        """Takes what `box` of `source` lost when it was cast to `dtype`."""
        if any(lost):
            with self._lock:
                self._lost[source][box] = lost
                self._dtypes.add(_name(dtype))

    def check(self) -> None:
        """Refuses numbers that became infinite, unless they are allowed.

        Raises:
            UserError: every tensor that has some, with their number.
        """
        if not self._allow_overflow and (faults := tuple(self._overflows())):
            raise UserError(faults)

    def remarks(self) -> Iterator[str]:
        """A sentence about the numbers that became infinite, and one about those now zero."""
        for kind in Lost._fields:
            counts = {held: self._count(held, kind) for held in self._lost}
            counts = {held: n for held, n in counts.items() if n}
            if counts:
                most = max(counts, key=lambda held: counts[held])
                yield (
                    f"{sum(counts.values())} numbers became {kind} in {self._dtypes_text()}, in "
                    f"{len(counts)} tensors; most of them, {counts[most]} of "
                    f"{volume(most.piece.box)}, in {most.name}"
                )

    def _overflows(self) -> Iterator[str]:
        wider = "fp32 holds" if "bf16" in self._dtypes else "bf16 and fp32 hold"
        for held in sorted(self._lost, key=lambda held: (str(held.stored.path), held.name)):
            if n := self._count(held, "infinite"):
                yield (
                    f"{held.stored.path}: {held.name}: {n} of {volume(held.piece.box)} numbers are "
                    f"too large for {self._dtypes_text()} and would become infinite; {wider} them."
                    f"{self._way_out}"
                )

    def _count(self, held: StoredSlice, kind: str) -> int:
        return sum(getattr(lost, kind) for lost in self._lost[held].values())

    def _dtypes_text(self) -> str:
        return " and ".join(sorted(self._dtypes))


def _lost(out: np.ndarray, values: np.ndarray) -> Lost:
    found, infinity = _magnitudes(out)
    infinite = zero = 0
    # most bands lose nothing, and two reductions show it
    if found.size and found.max() >= infinity:
        given, was_infinity = _magnitudes(values)
        infinite = int(np.count_nonzero((found == infinity) & (given < was_infinity)))
    if np.count_nonzero(found) < found.size:
        zero = int(np.count_nonzero((found == 0) & (_magnitudes(values)[0] != 0)))
    return Lost(infinite, zero)


def _magnitudes(values: np.ndarray) -> tuple[np.ndarray, int]:
    """The bits without the sign, which are ordered as the sizes are; and those of infinity."""
    raw = np.dtype(f"u{values.dtype.itemsize}")
    infinity = int(np.asarray(np.inf, values.dtype).view(raw))
    return values.view(raw) & raw.type(np.iinfo(raw).max >> 1), infinity


def _is_narrower(out: np.dtype, values: np.dtype) -> bool:
    """Whether a number of `values` may be too large or too small for `out`."""
    to, of = ml_dtypes.finfo(out), ml_dtypes.finfo(values)
    return float(to.max) < float(of.max) or float(to.smallest_subnormal) > float(
        of.smallest_subnormal
    )


def _name(dtype: np.dtype) -> str:
    return next(name for name, known in NUMPY_DTYPES.items() if known == dtype)
