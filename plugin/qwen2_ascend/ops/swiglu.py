"""SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from qwen2_ascend.ops.checks import check_swiglu


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up.

    Args:
        x: `[..., 2 * f]`, the gate in the first half, up in the second.

    Returns:
        `[..., f]`.

    Raises:
        ValueError: the width is odd.
    """
    check_swiglu(x)
    if not torch.is_grad_enabled():
        return _activated(x)[0]
    return _SwiGLU.apply(x)  # pyright: ignore[reportReturnType]


def _activated(x: Tensor) -> tuple[Tensor, Tensor]:
    """The result and silu(gate)."""
    gate, up = x.chunk(2, dim=-1)
    activated = silu(gate)
    return activated * up, activated


class _SwiGLU(torch.autograd.Function):
    """Writes both halves' gradients to where they belong; autograd would copy them together."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        result, activated = _activated(x)
        ctx.save_for_backward(x, activated)
        return result

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> Tensor:
        x, activated = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        d_x = torch.empty_like(x)
        d_gate, d_up = d_x.chunk(2, dim=-1)
        torch.mul(grad, up, out=d_gate)
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        torch.mul(grad, activated, out=d_up)
        return d_x
