"""Root-mean-square normalization (Zhang and Sennrich 2019, arXiv:1910.07467)."""

from __future__ import annotations

import torch

from qwen2_ascend.ops.checks import check_rms_norm


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
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
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return normal.to(x.dtype) * weight
