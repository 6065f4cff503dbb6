"""Causal attention with grouped queries."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Causal attention over whole sequences.

    Args:
        q: queries, `[s, b, np, hn]`.
        k: keys, `[s, b, ng, hn]`; np / ng query heads share one.
        v: values, `[s, b, ng, hn]`.
        softmax_scale: what the scores are multiplied by.
        dropout_p: share of the attention weights to drop.

    Returns:
        `[s, b, np * hn]`.
    """
    s, b, heads, width = q.shape
    # Sequences are independent, as heads are: counting them as heads of one batch keeps Megatron's
    # [s, b, ...] order through the kernel without a copy on either side.
    context = scaled_dot_product_attention(
        _heads_first(q),
        _heads_first(k),
        _heads_first(v),
        is_causal=True,
        dropout_p=dropout_p,
        scale=softmax_scale,
        enable_gqa=heads != k.shape[2],
    )
    return context.squeeze(0).transpose(0, 1).reshape(s, b, heads * width)


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """`[s, b, n, hn]` as `[1, b * n, s, hn]`."""
    return x.flatten(1, 2).transpose(0, 1).unsqueeze(0)
