"""Root-mean-square normalization (Zhang and Sennrich 2019, arXiv:1910.07467)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwen2_ascend.ops.checks import check_rms_norm


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis.

    Args:
        x: `[..., h]`; normalized in fp32 or in its own dtype, whichever is wider.
        weight: `[h]`.
        epsilon: added to the mean square.

    Returns:
        `[..., h]` in x's dtype.

    Raises:
        ValueError: the weight's size or dtype is not x's.
    """
    check_rms_norm(x, weight)
    if not torch.is_grad_enabled():
        return _normalized(x, weight, epsilon)[0]
    return _RMSNorm.apply(x, weight, epsilon)  # pyright: ignore[reportReturnType]


def _normalized(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The result and each token's 1 / rms, `[..., 1]`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * inverse_rms).to(x.dtype).mul_(weight), inverse_rms


class _RMSNorm(torch.autograd.Function):
    """Keeps x, which others keep too, and a number per token; autograd keeps x's copies in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        normed, inverse_rms = _normalized(x, weight, epsilon)
        ctx.save_for_backward(x, weight, inverse_rms)
        return normed

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        wide_weight = weight.to(inverse_rms.dtype)
        normal = x * inverse_rms
        product = (grad * normal).flatten(0, -2)
        d_weight = product.sum(0).to(weight.dtype)
        # what goes along the normalized x changes nothing
        along = torch.mv(product, wide_weight).view_as(inverse_rms).div_(-x.shape[-1])
        d_x = (grad * wide_weight).addcmul_(normal, along).mul_(inverse_rms)
        return d_x.to(x.dtype), d_weight, None
