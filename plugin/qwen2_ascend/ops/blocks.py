"""Attention of some queries to some keys: what ranks that share a sequence put together.

A block's result alone is a softmax over its own keys. Its log-sum-exp says how much of the whole
softmax that is, so results over different keys of the same queries can be merged. Backward of a
block takes the whole softmax's log-sum-exp and result, and gives the block's share of the gradients
(FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithm 2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Block(NamedTuple):
    """Queries that attend to keys of the same rows of a batch; none of the ranges is empty."""

    rows: range
    """Rows of the batch."""
    queries: range
    """Their places in q's first axis."""
    keys: range
    """Their places in k's first axis."""
    causal: bool
    """Whether each query but the last sees fewer keys: the last sees all of them, the one before
    it all but one. Otherwise every query sees every key."""


class PartialOutput(NamedTuple):
    """The attention of some queries over a block's keys alone."""

    rows: range
    queries: range
    context: Tensor
    """`[queries, rows, np, hn]`"""
    lse: Tensor
    """Logarithm of the sum of the exponentials of the scores, `[queries, rows, np]`, in fp32 or in
    the context's dtype where that is wider."""


class Gradients(NamedTuple):
    """What backward adds the blocks' shares to, in fp32 or wider."""

    q: Tensor
    """`[sq, b, np, hn]`"""
    k: Tensor
    """`[sk, b, ng, hn]`"""
    v: Tensor
    """`[sk, b, ng, hn]`"""

    def add(
        self,
        queries: Sequence[TokenSlice],
        keys: Sequence[TokenSlice],
        shares: Sequence[Sequence[Tensor]],
    ) -> None:
        """Adds the shares of q, k and v, each `[tokens, rows, n, hn]`, where they belong."""
        for gradient, places, parts in zip(self, (queries, keys, keys), shares, strict=True):
            for place, share in zip(places, parts, strict=True):
                place.of(gradient).add_(share)


class TokenSlice(NamedTuple):
    """Some tokens of some rows."""

    rows: range
    tokens: range

    def of(self, x: Tensor) -> Tensor:
        """The view of them in x, `[s, b, ...]`."""
        return x[self.tokens.start : self.tokens.stop, self.rows.start : self.rows.stop]


class PartialAttention(NamedTuple):
    """Attention over blocks, without autograd.

    `forward(q, k, v, blocks, *, softmax_scale)` gives PartialOutputs, together with each query of
    the blocks over each of its keys. `backward(d_context, q, k, v, context, lse, blocks, *,
    softmax_scale, into)` adds to the Gradients `into`.

    q, context and d_context are `[sq, b, np, hn]`, k and v `[sk, b, ng, hn]`, lse `[sq, b, np]`.
    The blocks of a call are all causal or all full, and so is what they launch: one kernel on an
    NPU.
    """

    forward: Callable[..., list[PartialOutput]]
    backward: Callable[..., None]


def squares(blocks: Sequence[Block]) -> Iterator[Block]:
    """The same as full blocks and causal ones with as many keys as queries."""
    for block in blocks:
        earlier = len(block.keys) - len(block.queries) if block.causal else 0
        if earlier:
            yield block._replace(keys=block.keys[:earlier], causal=False)
        yield block._replace(keys=block.keys[earlier:])
