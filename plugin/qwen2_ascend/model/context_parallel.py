"""Attention over sequences that several ranks share: --context-parallel-size.

- `megatron_cp_algo`, the ring (Liu et al. 2023, arXiv:2310.01889): keys and values go round; the
  next rank's are under way while the present ones are attended to.
- `kvallgather_cp_algo`: every rank gathers all keys and values, and has its own queries only.
- `ulysses_cp_algo` (Jacobs et al. 2023, arXiv:2309.14509): every rank exchanges a part of the
  sequence in all heads for the whole sequence in a part of the heads.

The first two keep for backward what a rank has of q, k, v, the result and its log-sum-exp, and
fetch the others' keys anew. `context_plan` says who attends to what.

Shapes: `s` tokens of a whole row, `cp` ranks, `b` rows, `np` query heads and `ng` query groups of
this rank, `hn` head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwen2_ascend.model.context_plan import (
    GATHER,
    RING,
    ULYSSES,
    Launch,
    gathered_launches,
    ring_launches,
    ulysses_repeats,
)
from qwen2_ascend.ops import Ops
from qwen2_ascend.ops.blocks import Gradients, PartialAttention, PartialOutput, TokenSlice
from qwen2_ascend.ops.checks import check_attention, check_ends

KEYS_AND_VALUES, THEIR_GRADIENTS = 0, 1
"""Tags of messages, for both kinds are under way at once."""


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    algorithm: str,
    group: dist.ProcessGroup,
    ops: Ops,
    softmax_scale: float,
    dropout_p: float = 0.0,
    ends: Sequence[int] | None = None,
) -> Tensor:
    """`ops.attention` of rows whose positions the ranks of `group` share as `sequence_ranges` says.

    Args:
        q: queries of this rank's positions, `[s/cp, b, np, hn]`.
        k: keys, `[s/cp, b, ng, hn]`.
        v: values, `[s/cp, b, ng, hn]`.
        algorithm: context_parallel_algo.
        group: the context-parallel group.
        ops: the operators.
        softmax_scale: what the scores are multiplied by.
        dropout_p: share of the attention weights to drop; with Ulysses only.
        ends: where each packed document ends, counted over the whole rows as in `ops.attention`.

    Returns:
        `[s/cp, b, np * hn]`.

    Raises:
        ValueError: dropout with another algorithm than Ulysses, or arguments that contradict each
            other.
    """
    options = {"softmax_scale": softmax_scale, "dropout_p": dropout_p, "ends": ends}
    cp = dist.get_world_size(group)
    if cp == 1:
        return ops.attention(q, k, v, **options)
    if algorithm == ULYSSES:
        q, k, v = _heads_for_tokens(q, k, v, group)
        return _tokens_for_heads(ops.attention(q, k, v, **options), group)
    if dropout_p:
        raise ValueError(f"attention dropout {dropout_p} with {algorithm}: use {ULYSSES}.")
    _check(q, k, v, cp, ends)
    ways = {RING: (_Ring, ring_launches), GATHER: (_Gathered, gathered_launches)}
    function, plan = ways[algorithm]
    whole = q.shape[0] * cp, q.shape[1], cp, dist.get_rank(group)
    launches = plan(*whole, None if ends is None else tuple(ends))
    return function.apply(q, k, v, _Work(ops.partial_attention, launches, softmax_scale, group))  # pyright: ignore


def _check(q: Tensor, k: Tensor, v: Tensor, cp: int, ends: Sequence[int] | None) -> None:
    check_attention(q, k, v, 0.0, None)
    s, b = q.shape[:2]
    if s % 2:
        raise ValueError(f"{s} tokens of a row are not two equal chunks.")
    if ends is not None:
        check_ends(ends, s * cp, b)


class _Work(NamedTuple):
    """What the blocks of a rank are computed with."""

    attention: PartialAttention
    launches: tuple[Launch, ...]
    softmax_scale: float
    group: dist.ProcessGroup

    def forward(self, q: Tensor, kv: Tensor, launch: Launch, into: _Merged) -> None:
        """Adds the attention of a launch's blocks."""
        if launch:
            options = {"softmax_scale": self.softmax_scale}
            into.add(self.attention.forward(q, kv[0], kv[1], launch, **options))

    def backward(self, kept: _Kept, kv: Tensor, launch: Launch, into: Gradients) -> None:
        """Adds the gradients of a launch's blocks."""
        if launch:
            d_context, q, context, lse = kept
            whole = d_context, q, kv[0], kv[1], context, lse
            self.attention.backward(*whole, launch, softmax_scale=self.softmax_scale, into=into)


class _Kept(NamedTuple):
    """What backward knows of all of a rank's queries."""

    d_context: Tensor
    q: Tensor
    context: Tensor
    lse: Tensor


class _Merged:
    """Attention over the keys so far, in fp32 or wider."""

    def __init__(self, q: Tensor) -> None:
        wide = torch.promote_types(q.dtype, torch.float32)
        self.context = torch.zeros(q.shape, dtype=wide, device=q.device)
        self.lse = torch.full(q.shape[:3], -torch.inf, dtype=wide, device=q.device)

    def add(self, parts: Sequence[PartialOutput]) -> None:
        """Takes in further keys."""
        for part in parts:
            place = TokenSlice(part.rows, part.queries)
            context, lse = place.of(self.context), place.of(self.lse)
            whole = torch.logaddexp(lse, part.lse)
            context.mul_((lse - whole).exp_().unsqueeze(-1))
            context.addcmul_(
                part.context.to(context.dtype), (part.lse - whole).exp_().unsqueeze(-1)
            )
            lse.copy_(whole)


def _keep(ctx: Any, q: Tensor, kv: Tensor, merged: _Merged, work: _Work) -> Tensor:
    """Keeps what backward needs; gives the result `[s/cp, b, np * hn]`."""
    context = merged.context.to(q.dtype).flatten(2)
    ctx.save_for_backward(q, kv, context, merged.lse)
    ctx.work = work
    return context


def _kept(ctx: Any, d_context: Tensor) -> tuple[_Kept, Tensor]:
    q, kv, context, lse = ctx.saved_tensors
    return _Kept(d_context.contiguous().view(q.shape), q, context.view(q.shape), lse), kv


def _zeros(q: Tensor, kv: Tensor) -> Gradients:
    wide = torch.promote_types(q.dtype, torch.float32)
    return Gradients(*(torch.zeros(x.shape, dtype=wide, device=q.device) for x in (q, *kv)))


# --- the ring -------------------------------------------------------------------------------------


class _Ring(torch.autograd.Function):
    """Keys and values go round; backward sends them round again, and their gradients after them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, work: _Work) -> Tensor:
        merged, kv = _Merged(q), torch.stack((k, v))
        for held, launch in _round(kv, work):
            work.forward(q, held, launch, merged)
        return _keep(ctx, q, kv, merged, work)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_context: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        work: _Work = ctx.work
        kept, kv = _kept(ctx, d_context)
        own = _zeros(kept.q, kv)
        others: _Exchange | None = None
        for step, (held, launch) in enumerate(_round(kv, work)):
            if step == 0:
                work.backward(kept, held, launch, own)
                continue
            # the keys of another rank: what the ranks before this one found for them comes after
            share = own._replace(k=torch.zeros_like(own.k), v=torch.zeros_like(own.v))
            work.backward(kept, held, launch, share)
            others = _onwards(share, others, kv.dtype, work.group)
        assert others is not None
        d_k, d_v = others.wait()
        return own.q.to(kv.dtype), (own.k + d_k).to(kv.dtype), (own.v + d_v).to(kv.dtype), None


def _round(kv: Tensor, work: _Work) -> Iterator[tuple[Tensor, Launch]]:
    """Each rank's keys and values with what to compute of them, one's own first.

    While they are computed the next ones are under way.
    """
    for step, launch in enumerate(work.launches):
        is_last = step == len(work.launches) - 1
        coming = None if is_last else _Exchange(kv, work.group, KEYS_AND_VALUES)
        yield kv, launch
        if coming:
            kv = coming.wait()


def _onwards(
    share: Gradients, before: _Exchange | None, dtype: torch.dtype, group: dist.ProcessGroup
) -> _Exchange:
    """Adds a rank's share to those before it, and sends the sum to the next rank."""
    total = torch.stack((share.k, share.v))
    if before:
        total += before.wait()
    return _Exchange(total.to(dtype), group, THEIR_GRADIENTS)


class _Exchange:
    """A tensor on its way to the next rank, and the previous rank's on its way here."""

    def __init__(self, sent: Tensor, group: dist.ProcessGroup, tag: int) -> None:
        self._sent, self._received = sent, torch.empty_like(sent)
        rank, cp = dist.get_rank(group), dist.get_world_size(group)
        following, previous = (dist.get_global_rank(group, n % cp) for n in (rank + 1, rank - 1))
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, following, group, tag),
                dist.P2POp(dist.irecv, self._received, previous, group, tag),
            ]
        )

    def wait(self) -> Tensor:
        """What the previous rank sent."""
        for work in self._works:
            work.wait()
        return self._received


# --- gathered keys and values ---------------------------------------------------------------------


class _Gathered(torch.autograd.Function):
    """All keys and values are gathered, in backward anew; their gradients are scattered."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, work: _Work) -> Tensor:
        merged, kv = _Merged(q), torch.stack((k, v))
        whole = _gather(kv, work.group)
        for launch in work.launches:
            work.forward(q, whole, launch, merged)
        return _keep(ctx, q, kv, merged, work)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_context: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        work: _Work = ctx.work
        kept, kv = _kept(ctx, d_context)
        whole = _gather(kv, work.group)
        gradients = _zeros(kept.q, whole)
        for launch in work.launches:
            work.backward(kept, whole, launch, gradients)
        d_k, d_v = _scatter(torch.stack(gradients[1:]).to(kv.dtype), work.group)
        return gradients.q.to(kv.dtype), d_k, d_v, None


def _gather(kv: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' `[2, s/cp, ...]` as `[2, s, ...]`, in the order of the rows."""
    cp = dist.get_world_size(group)
    gathered = kv.new_empty(cp * 2, *kv.shape[1:])
    dist.all_gather_into_tensor(gathered, kv, group=group)
    early, late = gathered.unflatten(0, (cp, 2)).chunk(2, dim=2)
    chunks = torch.cat((early, late.flip(0)))  # [2 * cp, 2, s / (2 * cp), ...]
    return chunks.transpose(0, 1).flatten(1, 2)


def _scatter(gradients: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the ranks of this rank's part of `[2, s, ...]`, as `[2, s/cp, ...]`."""
    cp = dist.get_world_size(group)
    early, late = gradients.unflatten(1, (2 * cp, -1)).transpose(0, 1).chunk(2)
    parts = torch.cat((early, late.flip(0)), dim=2)  # [cp, 2, s / cp, ...]
    own = torch.empty_like(parts[0])
    dist.reduce_scatter_tensor(own, parts.flatten(0, 1), group=group)
    return own


# --- Ulysses --------------------------------------------------------------------------------------


def _heads_for_tokens(
    q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, ...]:
    """`[s/cp, b, n, hn]` of all heads to `[s, b, n/cp, hn]` of this rank's, in one message."""
    cp = dist.get_world_size(group)
    repeats = ulysses_repeats(k.shape[2], cp)
    if repeats > 1:
        k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
    each = [x.unflatten(2, (cp, -1)) for x in (q, k, v)]
    numbers = [x.shape[3] for x in each]
    # [cp, s/cp, b, heads, hn]: what goes to each rank, and then what came from each
    sent = torch.cat(each, dim=3).permute(2, 0, 1, 3, 4)
    received = _AllToAll.apply(sent, group).flatten(0, 1).split(numbers, dim=2)  # pyright: ignore
    # of one's own each: a kept view of one would keep all three
    return tuple(x.contiguous() for x in received)


def _tokens_for_heads(context: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`[s, b, np/cp * hn]` of this rank's heads to `[s/cp, b, np * hn]` of all."""
    sent = context.unflatten(0, (dist.get_world_size(group), -1))
    received: Tensor = _AllToAll.apply(sent, group)  # pyright: ignore
    return received.permute(1, 2, 0, 3).flatten(2)


class _AllToAll(torch.autograd.Function):
    """Row n of a tensor goes to rank n; so does the gradient, back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchanged(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return _exchanged(gradient, ctx.group), None


def _exchanged(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.contiguous()
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=group)
    return received
