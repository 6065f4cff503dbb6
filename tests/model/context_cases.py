"""Rows of tokens that ranks share, for the tests of context parallelism: inputs and documents."""

from __future__ import annotations

import math
from typing import Any

ALGORITHMS = ("megatron_cp_algo", "kvallgather_cp_algo", "ulysses_cp_algo")
S = 48
"""Tokens of a row: 12 in a chunk at CP2, 6 at CP4."""
PACKINGS: dict[str, tuple[int, tuple[int, ...] | None]] = {
    "dense": (2, None),
    "one row": (1, (1, 2, 5, 6, 7, 19, 20, 43, 44, 48)),
    # a row that is one document; one that is cut off every chunk, with documents of one token
    "two rows": (2, (48, 53, 54, 55, 61, 85, 86, 87, 96)),
    "chunk by chunk": (2, tuple(range(6, 97, 6))),
    "token by token": (1, tuple(range(1, 49))),
}
"""Micro-batch and where the documents end."""
HEADS = (8, 4, 16)
"""np, ng, hn"""
SCALE = 0.3


def inputs(b: int, dtype: Any, heads: tuple[int, int, int] = HEADS, s: int = S) -> list[Any]:
    """Whole rows of q, k, v and the upstream gradient, equal on every rank."""
    import torch

    generator = torch.Generator().manual_seed(7)
    np_, ng, hn = heads
    shapes = (s, b, np_, hn), (s, b, ng, hn), (s, b, ng, hn), (s, b, np_ * hn)
    return [torch.randn(x, generator=generator, dtype=torch.float64).to(dtype) for x in shapes]


def own(x: Any, cp: int, rank: int, algorithm: str) -> Any:
    """What a rank holds of whole rows `[s, b, ...]`."""
    import torch

    from qwen2_ascend.parallel import sequence_ranges

    ranges = sequence_ranges(x.shape[0], cp, rank, algorithm)
    return torch.cat([x[r.start : r.stop] for r in ranges])


def output_and_gradients(attend: Any, tensors: Any, upstream: Any, **options: Any) -> list[Any]:
    """The result and the gradients of q, k, v."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    result = attend(*leaves, softmax_scale=SCALE, **options)
    result.backward(upstream)
    return [result.detach(), *(leaf.grad for leaf in leaves)]


def error(found: Any, exact: Any) -> float:
    """The largest difference, relative to the largest number, or to 1 where that is smaller: the
    gradients of q and k of documents of one token are zero."""
    exact = exact.double()
    return ((found.double() - exact).abs().max() / exact.abs().max().clamp(min=1)).item()


def sent_bytes(
    algorithm: str, cp: int, *, tokens: int, np: int, ng: int, hn: int, element: int
) -> tuple[float, float]:
    """What attention makes a rank send forward and backward, where a gather or a scatter is a ring.

    Args:
        algorithm: context_parallel_algo.
        cp: context_parallel_size.
        tokens: the tokens of all rows that this rank holds.
        np: query heads.
        ng: query groups.
        hn: head width.
        element: bytes of a number of q, k and v.
    """
    one_head = tokens * hn * element
    if algorithm == "ulysses_cp_algo":
        # q, k and v there and the result back; keys are repeated so that each rank gets as many
        once = (cp - 1) / cp * (2 * np + 2 * ng * (cp // math.gcd(ng, cp))) * one_head
        return once, once
    # keys and values; in backward again, and their gradients
    once = (cp - 1) * 2 * ng * one_head
    return once, 2 * once
