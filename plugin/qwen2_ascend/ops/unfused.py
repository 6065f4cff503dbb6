"""Causal attention in operators of their own, for hunting a difference: no fused kernel in it.

`attention.py` is plain as well, but its one call reaches a flash kernel on every accelerator, on an
NPU the same one as `npu.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import dropout

from qwen2_ascend.ops.blocks import Block, Gradients, PartialAttention, PartialOutput, TokenSlice
from qwen2_ascend.ops.checks import check_attention

QUERIES_AT_ONCE = 1024
"""The queries whose scores partial attention holds in memory."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    dropout_p: float = 0.0,
    ends: Sequence[int] | None = None,
) -> Tensor:
    """What `attention.attention` computes, with the whole matrix of scores in memory.

    The arguments, the shapes and what is refused are the same. Scores and softmax are in fp32, or
    in q's dtype where that is wider.
    """
    check_attention(q, k, v, dropout_p, ends)
    grouped = q.unflatten(2, (k.shape[2], -1))  # [s, b, ng, np / ng, hn]
    scores = torch.einsum("sbgrd,tbgd->bgrst", grouped, k)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * softmax_scale
    hidden = _hidden(q.shape[0], q.shape[1], ends, q.device)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).to(q.dtype)
    weights = dropout(weights, dropout_p, training=dropout_p > 0)
    return torch.einsum("bgrst,tbgd->sbgrd", weights, v).flatten(2)


def _hidden(s: int, b: int, ends: Sequence[int] | None, device: torch.device) -> Tensor:
    """True where a query must not look, `[b or 1, 1, 1, s, s]`."""
    later = torch.ones(s, s, dtype=torch.bool, device=device).triu(1)
    if ends is None:
        return later[None, None, None]
    lengths = torch.tensor([stop - start for start, stop in pairwise((0, *ends))])
    document = torch.arange(len(ends)).repeat_interleave(lengths).view(b, 1, 1, s).to(device)
    return later | (document[..., :, None] != document[..., None, :])


# --- over blocks ----------------------------------------------------------------------------------


def _partial(
    q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block], *, softmax_scale: float
) -> list[PartialOutput]:
    parts = []
    for block in _bands(blocks):
        own_q, own_k, own_v = _grouped(block, q, k, v)
        scores = _scores(block, own_q, own_k, softmax_scale)
        lse = scores.logsumexp(-1, keepdim=True)
        weights = (scores - lse).exp_().to(q.dtype)
        context = torch.einsum("bgrst,tbgd->sbgrd", weights, own_v).flatten(2, 3)
        lse = lse.squeeze(-1).permute(3, 0, 1, 2).flatten(2)
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
    for block in _bands(blocks):
        queries, keys = TokenSlice(block.rows, block.queries), TokenSlice(block.rows, block.keys)
        own_q, own_k, own_v = _grouped(block, q, k, v)
        grouped = (k.shape[2], -1)
        upstream = queries.of(d_context).unflatten(2, grouped)
        own_lse = queries.of(lse).unflatten(2, grouped).permute(1, 2, 3, 0).unsqueeze(-1)
        scores = _scores(block, own_q, own_k, softmax_scale)
        weights = (scores - own_lse).exp_()
        # in fp32, for their difference is taken: rounded, one of them would leave its error
        wide, wide_v = upstream.to(weights.dtype), own_v.to(weights.dtype)
        d_weights = torch.einsum("sbgrd,tbgd->bgrst", wide, wide_v)
        along = (queries.of(context).unflatten(2, grouped) * wide).sum(-1)
        d_scores = weights * (d_weights - along.permute(1, 2, 3, 0).unsqueeze(-1)) * softmax_scale
        d_scores, weights = d_scores.to(q.dtype), weights.to(q.dtype)
        d_q = torch.einsum("bgrst,tbgd->sbgrd", d_scores, own_k).flatten(2, 3)
        d_k = torch.einsum("bgrst,sbgrd->tbgd", d_scores, own_q)
        d_v = torch.einsum("bgrst,sbgrd->tbgd", weights, upstream)
        into.add([queries], [keys], ([d_q], [d_k], [d_v]))


partial_attention = PartialAttention(_partial, _partial_backward)
"""Partial attention by matrix products, on every device."""


def _bands(blocks: Sequence[Block]) -> Iterator[Block]:
    """The blocks with at most QUERIES_AT_ONCE queries each."""
    for block in blocks:
        for start in range(0, len(block.queries), QUERIES_AT_ONCE):
            queries = block.queries[start : start + QUERIES_AT_ONCE]
            # the later queries' own keys are hidden from the earlier ones
            hidden = block.queries.stop - queries.stop if block.causal else 0
            yield block._replace(queries=queries, keys=block.keys[: len(block.keys) - hidden])


def _grouped(block: Block, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The block's q `[s, b, ng, np / ng, hn]`, k and v `[t, b, ng, hn]`."""
    queries, keys = TokenSlice(block.rows, block.queries), TokenSlice(block.rows, block.keys)
    return queries.of(q).unflatten(2, (k.shape[2], -1)), keys.of(k), keys.of(v)


def _scores(block: Block, q: Tensor, k: Tensor, softmax_scale: float) -> Tensor:
    """`[b, ng, np / ng, s, t]` in fp32 or wider, -inf where a query must not look."""
    scores = torch.einsum("sbgrd,tbgd->bgrst", q, k)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * softmax_scale
    if not block.causal:
        return scores
    s, t = len(block.queries), len(block.keys)
    later = torch.ones(s, t, dtype=torch.bool, device=q.device).triu(t - s + 1)
    return scores.masked_fill(later, -torch.inf)
