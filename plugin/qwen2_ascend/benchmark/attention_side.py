"""One side of the attention benchmark: passes forward and backward for each question."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qwen2_ascend.benchmark.device import measured, started_runtime
from qwen2_ascend.dtypes import TORCH_DTYPES
from qwen2_ascend.ops import get_ops
from qwen2_ascend.runtime import Runtime

SEED = 1234
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q `[s, b, np, hn]`, k and v `[s, b, ng, hn]` to `[s, b, np, hn]`."""


def prepare(side: str, device: str) -> Callable[[Any], Any]:
    """What answers a question: the side's attention on a device."""
    runtime = started_runtime(device)
    attention = _sdpa if side == "sdpa" else _own(side, runtime.name)
    return partial(_measured, attention, runtime)


def _own(side: str, device: str) -> Attention:
    backend = "npu" if device == "npu" else "torch"
    operator = get_ops(backend, plain=("attention",) if side == "unfused" else ()).attention

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return operator(q, k, v, softmax_scale=q.shape[-1] ** -0.5).view(q.shape)

    return attention


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    context = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return context.permute(2, 0, 1, 3).contiguous()


def _measured(attention: Attention, runtime: Runtime, question: dict[str, Any]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(SEED)
    dtype = TORCH_DTYPES[question["dtype"]]

    def drawn(kind: str) -> Tensor:
        numbers = torch.randn(question[kind], generator=generator)
        return numbers.to(runtime.device, dtype)

    q, k, v = drawn("query_shape"), drawn("key_shape"), drawn("key_shape")
    inputs = [x.requires_grad_() for x in (q, k, v)]
    grad = drawn("query_shape")

    def passes() -> tuple[Tensor, ...]:
        context, grads = inputs[0], ()
        for _ in range(question["steps"]):
            context = attention(*inputs)
            grads = torch.autograd.grad(context, inputs, grad)
        return context, *grads

    results, figures = measured(runtime, passes)
    # a sum of squares hides a permutation, weights that grow along the numbers do not
    return {**figures, "sums": [_weighted(x) for x in results]}


def _weighted(x: Tensor) -> float:
    numbers = x.detach().float().cpu().flatten().double()
    return float((numbers.square() * torch.linspace(1, 2, len(numbers), dtype=torch.double)).sum())
