"""Attention over blocks, by torch's flash kernel and by matrix products, against its formula."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwen2_ascend.ops import get_ops, unfused
from qwen2_ascend.ops.blocks import Block, Gradients, PartialAttention, squares

HEADS, GROUPS, WIDTH, SCALE = 6, 2, 4, 0.3
OPERATORS = {
    "flash": get_ops("torch").partial_attention,
    "products": get_ops("torch", plain=("attention",)).partial_attention,
}
BLOCKS = {
    "full": [Block(range(2), range(1, 4), range(2, 9), False)],
    "causal": [Block(range(2), range(1, 6), range(1, 6), True)],
    "causal with earlier keys": [Block(range(2), range(4), range(1, 8), True)],
    "one query": [Block(range(1, 2), range(3, 4), range(8), True)],
    "several": [
        Block(range(1), range(3), range(1, 4), False),
        Block(range(1), range(3, 5), range(1, 4), False),
        Block(range(1, 2), range(1, 5), range(9), False),
    ],
}


def tensors(s: int = 6, t: int = 9) -> list[torch.Tensor]:
    """q, k, v and the upstream gradient of two rows."""
    generator = torch.Generator().manual_seed(3)
    shapes = (
        (s, 2, HEADS, WIDTH),
        (t, 2, GROUPS, WIDTH),
        (t, 2, GROUPS, WIDTH),
        (s, 2, HEADS, WIDTH),
    )
    return [torch.randn(x, generator=generator, dtype=torch.float64) for x in shapes]


def written_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: list[Block]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The context and the log-sum-exp over all keys of the blocks; 0 and -inf without any."""
    seen = torch.zeros(q.shape[1], q.shape[0], k.shape[0], dtype=torch.bool)
    for block in blocks:
        for row in block.rows:
            for n, query in enumerate(reversed(block.queries)):
                keys = block.keys[: len(block.keys) - (n if block.causal else 0)]
                seen[row, query, keys.start : keys.stop] = True
    k, v = (x.repeat_interleave(HEADS // GROUPS, 2) for x in (k, v))
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) * SCALE
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    context = torch.einsum("bnst,tbnd->sbnd", scores.softmax(-1).nan_to_num(0.0), v)
    return context, scores.logsumexp(-1).permute(2, 0, 1)


def together(operator: PartialAttention, q, k, v, blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """The parts, each in its place; those of the same queries merged by their log-sum-exp."""
    context = torch.zeros_like(q)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=q.dtype)
    for part in operator.forward(q, k, v, blocks, softmax_scale=SCALE):
        here = slice(part.queries.start, part.queries.stop), slice(part.rows.start, part.rows.stop)
        whole = torch.logaddexp(lse[here], part.lse)
        old, new = ((x - whole).exp().unsqueeze(-1) for x in (lse[here], part.lse))
        context[here] = context[here] * old + part.context * new
        lse[here] = whole
    return context, lse


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("kind", OPERATORS)
def test_context_and_log_sum_exp(kind: str, name: str) -> None:
    q, k, v, _ = tensors()
    found = together(OPERATORS[kind], q, k, v, BLOCKS[name])
    expected = written_out(q, k, v, BLOCKS[name])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("kind", OPERATORS)
def test_gradients_take_the_statistics_of_all_keys(kind: str, name: str) -> None:
    """The blocks are a part of what the queries see; the other keys have gradients elsewhere."""
    q, k, v, upstream = tensors()
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    blocks = list(squares(BLOCKS[name]))
    context, lse = written_out(*leaves, blocks)
    context.backward(upstream)
    into = Gradients(*map(torch.zeros_like, (q, k, v)))
    statistics = context.detach(), lse.detach()
    for block in blocks:
        OPERATORS[kind].backward(
            upstream, q, k, v, *statistics, [block], softmax_scale=SCALE, into=into
        )
    for found, leaf in zip(into, leaves, strict=True):
        torch.testing.assert_close(found, leaf.grad, rtol=0, atol=1e-14)


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operator makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(results) if isinstance(x, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return results


@pytest.mark.parametrize("kind", OPERATORS)
def test_scores_of_all_queries_are_never_in_memory(kind: str, monkeypatch) -> None:
    monkeypatch.setattr(unfused, "QUERIES_AT_ONCE", 64)
    s = 512
    q, k, v, upstream = tensors(s, s)
    blocks = [Block(range(2), range(s), range(s), True)]
    with _Largest() as largest:
        context, lse = together(OPERATORS[kind], q, k, v, blocks)
        into = Gradients(*map(torch.zeros_like, (q, k, v)))
        OPERATORS[kind].backward(
            upstream, q, k, v, context, lse, blocks, softmax_scale=SCALE, into=into
        )
    heads = 2 * HEADS
    assert largest.numel == (heads * s * WIDTH if kind == "flash" else heads * 64 * s)


def test_switching_attention_off_takes_products_for_blocks_too() -> None:
    assert OPERATORS["products"] is unfused.partial_attention
    assert OPERATORS["flash"] is not unfused.partial_attention
