"""Products whose exchange between tensor-parallel ranks goes on while they are computed.

A column-parallel layer gathers its input's rows and multiplies them; a row-parallel layer
multiplies and sums over the ranks. `Pieces` cuts such a product by rows and exchanges one piece
while the next is computed (--use-ascend-coc); `ops/npu_mc2.py` has operators of torch_npu that do
both at once (--use-ascend-mc2).

Letters: `n` ranks, `m` rows of one rank (tokens of its part of the sequence), `k` and `o` columns
before and after the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import (
    ProcessGroup,
    all_gather_into_tensor,
    all_reduce,
    reduce_scatter_tensor,
)

from qwen2_ascend.errors import UserError

Pending = Callable[[], Tensor]
"""Waits for an exchange that has been started, and gives its result."""


class Overlap(Protocol):
    """A way to multiply and exchange at once, among the ranks of one group."""

    def gathered(self, x: Tensor, w: Tensor, *, keep: bool) -> tuple[Tensor, Tensor | None]:
        """x `[m, k]` of all ranks, `[n * m, k]`, times w `[k, o]`.

        Returns:
            `[n * m, o]`, and the gathered rows if `keep`.
        """
        ...

    def scattered(self, x: Tensor, w: Tensor) -> Pending:
        """x `[n * m, k]` times w `[k, o]`, summed over the ranks: this rank's rows, `[m, o]`."""
        ...

    def summed(self, x: Tensor, w: Tensor) -> Pending:
        """x `[m, k]` times w `[k, o]`, summed over the ranks, `[m, o]`."""
        ...


MakeOverlap = Callable[[ProcessGroup], Overlap]


def make_overlap(*, use_ascend_mc2: bool = False, coc_parallel_num: int = 1) -> MakeOverlap | None:
    """What makes the way that the flags ask for; None leaves the products as they are.

    Raises:
        UserError: both ways are asked for, or torch_npu's operators are not there.
    """
    if use_ascend_mc2 and coc_parallel_num > 1:
        raise UserError("use_ascend_mc2 and coc_parallel_num above 1: give one of them.")
    if coc_parallel_num > 1:
        return partial(Pieces, number=coc_parallel_num)
    if not use_ascend_mc2:
        return None
    try:
        from qwen2_ascend.ops.npu_mc2 import FusedProducts
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"use_ascend_mc2 needs torch_npu, which cannot be imported ({error}); leave it out."
        ) from error
    return FusedProducts


class Pieces:
    """Each product is cut by rows into pieces as equal as can be, and each is exchanged alone.

    While a piece is under way the next is computed. The pieces' rows lie in the result where those
    of the whole product do.
    """

    def __init__(self, group: ProcessGroup, *, number: int) -> None:
        self._group = group
        self._number = number

    def gathered(self, x: Tensor, w: Tensor, *, keep: bool) -> tuple[Tensor, Tensor | None]:
        """See `Overlap`; at most two pieces of gathered rows are there at once."""
        n, m = self._group.size(), len(x)
        out = x.new_empty(n, m, w.shape[1])
        total = x.new_empty(n, m, x.shape[1]) if keep else None

        def finish(rows: slice, gathering: Pending) -> None:
            piece = gathering()
            out[:, rows] = torch.mm(piece, w).view(n, -1, w.shape[1])
            if total is not None:
                total[:, rows] = piece.view(n, -1, x.shape[1])

        ahead: tuple[slice, Pending] | None = None
        for rows in _cuts(m, self._number):
            started = rows, start_gather(x[rows], self._group)
            if ahead is not None:
                finish(*ahead)
            ahead = started
        assert ahead is not None, "no rows"
        finish(*ahead)
        return out.flatten(0, 1), None if total is None else total.flatten(0, 1)

    def scattered(self, x: Tensor, w: Tensor) -> Pending:
        """See `Overlap`."""
        n = self._group.size()
        by_rank = x.view(n, -1, x.shape[1])
        m = by_rank.shape[1]
        out = x.new_empty(m, w.shape[1])
        started = [
            start_scatter(torch.mm(by_rank[:, rows].flatten(0, 1), w), self._group, out[rows])
            for rows in _cuts(m, self._number)
        ]
        return partial(_all_of, started, out)

    def summed(self, x: Tensor, w: Tensor) -> Pending:
        """See `Overlap`."""
        out = x.new_empty(len(x), w.shape[1])
        started = []
        for rows in _cuts(len(x), self._number):
            torch.mm(x[rows], w, out=out[rows])
            started.append(start_sum(out[rows], self._group))
        return partial(_all_of, started, out)


def start_gather(x: Tensor, group: ProcessGroup) -> Pending:
    """Starts to gather all ranks' rows, `[m, k]` each, to `[n * m, k]`."""
    x = x.contiguous()
    total = x.new_empty(group.size() * len(x), *x.shape[1:])
    work = all_gather_into_tensor(total, x, group=group, async_op=True)
    return partial(_finished, work, total, x)


def start_scatter(x: Tensor, group: ProcessGroup, out: Tensor | None = None) -> Pending:
    """Starts to sum `[n * m, o]` over the ranks, of which this one gets its rows, into `out`."""
    if out is None:
        out = x.new_empty(len(x) // group.size(), *x.shape[1:])
    work = reduce_scatter_tensor(out, x, group=group, async_op=True)
    return partial(_finished, work, out, x)


def start_sum(x: Tensor, group: ProcessGroup) -> Pending:
    """Starts to sum x over the ranks, in place."""
    return partial(_finished, all_reduce(x, group=group, async_op=True), x, x)


def _finished(work: Any, result: Tensor, source: Tensor) -> Tensor:
    """Waits; whoever holds this holds `source` too, which must live until then."""
    work.wait()
    return result


def _all_of(started: list[Pending], result: Tensor) -> Tensor:
    for finish in started:
        finish()
    return result


def _cuts(m: int, number: int) -> Iterator[slice]:
    """m rows in `number` ranges, or as many as there are rows."""
    number = min(number, m)
    ends = [m * i // number for i in range(number + 1)]
    return map(slice, ends, ends[1:])
