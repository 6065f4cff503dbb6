"""SequenceCut: which part of every sequence this rank holds under context parallelism.

The parts are cut once, before the first layer, and stay cut to the last: norms, products and losses
go token by token. Attention alone sees beyond them, and rotary embedding has to know where each
token is in the whole sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from qwen2_ascend.parallel import ParallelLayout, sequence_ranges


@dataclass(frozen=True)
class SequenceCut:
    """One rank's part of every sequence."""

    algorithm: str
    """context_parallel_algo."""
    group: Any
    """The ranks that share each sequence."""
    size: int
    rank: int
    """This rank's number in the group."""

    @classmethod
    def of_layout(cls, layout: ParallelLayout) -> SequenceCut | None:
        """This rank's, of the process groups that `layout` was initialized with; None at CP1."""
        if layout.cp == 1:
            return None
        group = parallel_state.get_context_parallel_group()
        rank = parallel_state.get_context_parallel_rank()
        return cls(layout.context_parallel_algo, group, layout.cp, rank)

    def ranges(self, length: int, rank: int | None = None) -> tuple[range, ...]:
        """Positions of a sequence of `length` tokens, of this rank or of another in the group."""
        rank = self.rank if rank is None else rank
        return sequence_ranges(length, self.size, rank, self.algorithm)

    def own(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's part of a tensor, in the rank's order.

        Args:
            whole: its axis `dim` is the sequence.
            dim: the axis.
        """
        ranges = self.ranges(whole.shape[dim])
        return torch.cat([whole.narrow(dim, part.start, len(part)) for part in ranges], dim)

    def whole(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """What `own` has cut, put together again.

        Args:
            parts: the parts of all ranks of the group, in their order.
            dim: the axis that is the sequence.
        """
        length = sum(part.shape[dim] for part in parts)
        pieces: dict[int, Tensor] = {}
        for rank, part in enumerate(parts):
            ranges = self.ranges(length, rank)
            split = part.split([len(positions) for positions in ranges], dim)
            pieces |= {x.start: piece for x, piece in zip(ranges, split, strict=True)}
        return torch.cat([pieces[start] for start in sorted(pieces)], dim)


def cut_attention(layers: Iterable[Any], cut: SequenceCut | None) -> None:
    """Lets the attention of each of a chunk's layers see the whole sequence."""
    for layer in layers:
        layer.self_attention.core_attention.sequence_cut = cut


def is_first_part() -> bool:
    """Whether this is the first of the ranks that share each sequence."""
    return parallel_state.get_context_parallel_rank() == 0


def sum_over_parts(own: Tensor) -> Tensor:
    """Sums over the ranks that share each sequence; backward hands each the gradient of the sum.

    So what is computed of the sum counts once, though every one of these ranks computes it: the
    gradient of a weight is added up over them.
    """
    if parallel_state.get_context_parallel_world_size() == 1:
        return own
    return _Sum.apply(own, parallel_state.get_context_parallel_group())  # pyright: ignore


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Any) -> Tensor:
        total = own.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
