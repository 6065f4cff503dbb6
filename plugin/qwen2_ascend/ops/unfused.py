"""Causal attention in operators of their own, for hunting a difference: no fused kernel in it.

`attention.py` is plain as well, but its one call reaches a flash kernel on every accelerator, on an
NPU the same one as `npu.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch.nn.functional import dropout

from qwen2_ascend.ops.checks import check_attention


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float,
    dropout_p: float = 0.0,
    ends: Sequence[int] | None = None,
) -> torch.Tensor:
    """What `attention.attention` computes, with the whole matrix of scores in memory.

    Scores and softmax are in fp32, or in q's dtype where that is wider.

    Args:
        q: queries, `[s, b, np, hn]`.
        k: keys, `[s, b, ng, hn]`.
        v: values, `[s, b, ng, hn]`.
        softmax_scale: what the scores are multiplied by.
        dropout_p: share of the attention weights to drop.
        ends: where each packed document ends, as in `attention.attention`.

    Returns:
        `[s, b, np * hn]`.

    Raises:
        ValueError: arguments that contradict each other.
        UserError: attention dropout out of range.
    """
    check_attention(q, k, v, dropout_p, ends)
    grouped = q.unflatten(2, (k.shape[2], -1))  # [s, b, ng, np / ng, hn]
    scores = torch.einsum("sbgrd,tbgd->bgrst", grouped, k)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * softmax_scale
    hidden = _hidden(q.shape[0], q.shape[1], ends, q.device)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).to(q.dtype)
    weights = dropout(weights, dropout_p, training=dropout_p > 0)
    return torch.einsum("bgrst,tbgd->sbgrd", weights, v).flatten(2)


def _hidden(s: int, b: int, ends: Sequence[int] | None, device: torch.device) -> torch.Tensor:
    """True where a query must not look, `[b or 1, 1, 1, s, s]`."""
    later = torch.ones(s, s, dtype=torch.bool, device=device).triu(1)
    if ends is None:
        return later[None, None, None]
    lengths = torch.tensor([stop - start for start, stop in pairwise((0, *ends))])
    document = torch.arange(len(ends)).repeat_interleave(lengths).view(b, 1, 1, s).to(device)
    return later | (document[..., :, None] != document[..., None, :])
