"""Stand-in: attention over the whole gathered sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qwen2_ascend.ops import Ops


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    algorithm: str,
    group: Any,
    ops: Ops,
    softmax_scale: float,
    dropout_p: float = 0.0,
    ends: Sequence[int] | None = None,
) -> Tensor:
    from qwen2_ascend.model.sequence_cut import SequenceCut

    cut = SequenceCut(algorithm, group, group.size(), group.rank())
    whole = [cut.whole(_Gather.apply(x.contiguous(), group), 0) for x in (q, k, v)]
    out = ops.attention(*whole, softmax_scale=softmax_scale, dropout_p=dropout_p, ends=ends)
    return cut.own(out, 0)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        torch.distributed.all_gather(parts, x, group=group)
        return tuple(parts)

    @staticmethod
    def backward(ctx, *grads):
        total = torch.stack(grads)
        torch.distributed.all_reduce(total, group=ctx.group)
        return total[ctx.group.rank()], None
