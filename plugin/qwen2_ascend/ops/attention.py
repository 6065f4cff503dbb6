"""Causal attention with grouped queries: whole sequences, packed documents, and with a cache."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qwen2_ascend.ops import unfused
from qwen2_ascend.ops.blocks import (
    Block,
    Gradients,
    PartialAttention,
    PartialOutput,
    TokenSlice,
    squares,
)
from qwen2_ascend.ops.checks import check_attention, check_cached_attention

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    dropout_p: float = 0.0,
    ends: Sequence[int] | None = None,
) -> Tensor:
    """Causal attention over whole sequences, or within each document of packed ones.

    Args:
        q: queries, `[s, b, np, hn]`.
        k: keys, `[s, b, ng, hn]`; np / ng query heads share one.
        v: values, `[s, b, ng, hn]`.
        softmax_scale: what the scores are multiplied by.
        dropout_p: share of the attention weights to drop.
        ends: where each document ends, counted over the rows of the batch one after the other:
            rising, without the leading 0, the last is b * s. No document spans two rows.

    Returns:
        `[s, b, np * hn]`.

    Raises:
        ValueError: arguments that contradict each other.
        UserError: attention dropout out of range.
    """
    check_attention(q, k, v, dropout_p, ends)
    s, b, heads, width = q.shape
    if ends is None:
        return _attend(q, k, v, softmax_scale, dropout_p).reshape(s, b, heads * width)
    rows = [x.transpose(0, 1).flatten(0, 1).unsqueeze(1) for x in (q, k, v)]
    documents = []
    for start, end in pairwise((0, *ends)):
        q, k, v = (x[start:end] for x in rows)
        documents.append(_attend(q, k, v, softmax_scale, dropout_p))
    context = torch.cat(documents).view(b, s, heads * width).transpose(0, 1)
    # contiguous() would keep the odd stride of an axis of 1, for which matmul expands its weight
    # to one copy per token: 200 times slower in bf16
    return context.reshape(s * b, heads * width).view(s, b, heads * width)


def cached_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    lengths: Sequence[int],
    softmax_scale: float,
) -> Tensor:
    """Causal attention of the newest tokens over a cache that already holds them; no gradient.

    Args:
        q: queries of the newest s tokens of each sequence, `[s, b, np, hn]`.
        keys: the cache, `[b, ng, capacity, hn]`.
        values: the cache, `[b, ng, capacity, hn]`.
        lengths: keys of each sequence that count, the newest s included, as host numbers.
        softmax_scale: what the scores are multiplied by.

    Returns:
        `[s, b, np * hn]`.

    Raises:
        ValueError: arguments that contradict each other.
    """
    check_cached_attention(q, keys, values, lengths)
    s, b, heads, width = q.shape
    groups, longest = keys.shape[1], max(lengths)
    per_group = heads // groups
    mask = None
    if s > 1 or min(lengths) < longest:
        last = torch.tensor(lengths, device=q.device).view(b, 1, 1, 1) - s
        seen_to = last + torch.arange(s, device=q.device).repeat_interleave(per_group).view(-1, 1)
        mask = torch.arange(longest, device=q.device) <= seen_to
    # The heads of a group count as further queries of one head: its keys are read once, where
    # enable_gqa repeats them for each head (bf16 on the CPU: ten times slower).
    folded = q.view(s, b, groups, per_group, width).permute(1, 2, 0, 3, 4).flatten(2, 3)
    context = scaled_dot_product_attention(
        folded, keys[:, :, :longest], values[:, :, :longest], attn_mask=mask, scale=softmax_scale
    )
    context = context.view(b, groups, s, per_group, width)
    return context.permute(2, 0, 1, 3, 4).reshape(s, b, heads * width)


def _attend(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, dropout_p: float) -> Tensor:
    """`[s, b, np, hn]` of causal attention within each sequence."""
    # Sequences are independent, as heads are: counting them as heads of one batch keeps Megatron's
    # [s, b, ...] order through the kernel without a copy on either side.
    context = scaled_dot_product_attention(
        _heads_first(q),
        _heads_first(k),
        _heads_first(v),
        is_causal=True,
        dropout_p=dropout_p,
        scale=softmax_scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return context.squeeze(0).transpose(0, 1).reshape(q.shape)


def _heads_first(x: Tensor) -> Tensor:
    """`[s, b, n, hn]` as `[1, b * n, s, hn]`."""
    return x.flatten(1, 2).transpose(0, 1).unsqueeze(0)


# --- over blocks ----------------------------------------------------------------------------------


def _partial(
    q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block], *, softmax_scale: float
) -> list[PartialOutput]:
    if q.device.type != "cpu":
        return unfused.partial_attention.forward(q, k, v, blocks, softmax_scale=softmax_scale)
    parts = []
    for block in squares(blocks):
        inputs = _of_block(block, q, k, v)
        context, lse = _flash(*inputs, 0.0, block.causal, scale=softmax_scale)
        shape = (len(block.queries), len(block.rows), q.shape[2])
        context = context.squeeze(0).transpose(0, 1).reshape(*shape, q.shape[3])
        lse = lse.squeeze(0).t().reshape(shape)
        parts.append(PartialOutput(block.rows, block.queries, context, lse))
    return parts


def _partial_backward(
    d_context: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: Tensor,
    lse: Tensor,
    blocks: Sequence[Block],
    *,
    softmax_scale: float,
    into: Gradients,
) -> None:
    whole = d_context, q, k, v, context, lse
    if q.device.type != "cpu":
        backward = unfused.partial_attention.backward
        return backward(*whole, blocks, softmax_scale=softmax_scale, into=into)
    for block in squares(blocks):
        queries, keys = TokenSlice(block.rows, block.queries), TokenSlice(block.rows, block.keys)
        upstream, result = (_heads_first(queries.of(x)) for x in (d_context, context))
        statistics = queries.of(lse).flatten(1).t().unsqueeze(0)
        inputs = _of_block(block, q, k, v)
        options = {"scale": softmax_scale}
        shares = _flash_backward(
            upstream, *inputs, result, statistics, 0.0, block.causal, **options
        )
        d_q, d_k, d_v = (
            share.squeeze(0).transpose(0, 1).unflatten(1, (len(block.rows), q.shape[2]))
            for share in shares
        )
        d_k, d_v = (x.unflatten(2, (k.shape[2], -1)).sum(3, dtype=into.k.dtype) for x in (d_k, d_v))
        into.add([queries], [keys], ([d_q], [d_k], [d_v]))
    return None


partial_attention = PartialAttention(_partial, _partial_backward)
"""Partial attention by torch's flash kernel for CPUs, which gives the log-sum-exp; elsewhere by
matrix products."""


def _of_block(block: Block, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """The block's q, k and v as `[1, b * np, s, hn]`: each query head with its own keys."""
    queries, keys = TokenSlice(block.rows, block.queries), TokenSlice(block.rows, block.keys)
    per_group = q.shape[2] // k.shape[2]
    own = (keys.of(x).repeat_interleave(per_group, 2) for x in (k, v))
    return tuple(_heads_first(x) for x in (queries.of(q), *own))
