"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), halves rotated, full width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwen2_ascend.ops.checks import check_rotary


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + rotate_half(x) * sin.

    Args:
        x: heads, `[s, b, n, hn]` or with more axes between the first and the last.
        cos: `[s, hn]`, both halves of the last axis equal; `[s, b, hn]` where sequences differ in
            their positions.
        sin: cos's shape.

    Returns:
        x's shape and dtype, contiguous.

    Raises:
        ValueError: cos and sin do not fit x, or its width is odd.
    """
    check_rotary(x, cos, sin)
    shape = (*cos.shape[:-1], *[1] * (x.dim() - cos.dim()), cos.shape[-1])
    cos, sin = cos.view(shape), sin.view(shape)
    if not torch.is_grad_enabled():
        return _turned(x, cos, sin)
    return _Rotary.apply(x, cos, sin)  # pyright: ignore[reportReturnType]


def _turned(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """x turned by its position's angle, or by as much backwards; without rotate_half's copies."""
    first, second = x.chunk(2, dim=-1)
    sin_first, sin_second = sin.chunk(2, dim=-1)
    sign = 1
    if back:
        # the transpose: each half's gradient meets the sine that the half was multiplied by
        sin_first, sin_second, sign = sin_second, sin_first, -1
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(x, cos, out=result)
    result_first, result_second = result.chunk(2, dim=-1)
    result_first.addcmul_(second, sin_first, value=-sign)
    result_second.addcmul_(first, sin_second, value=sign)
    return result


class _Rotary(torch.autograd.Function):
    """Turns the gradient back; autograd would split it, negate a half and put it together again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, back=True), None, None
