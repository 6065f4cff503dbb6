"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), halves rotated, full width."""

from __future__ import annotations

import torch

from qwen2_ascend.ops.checks import check_rotary


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
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
    first, second = x.chunk(2, dim=-1)
    return x * cos.view(shape) + torch.cat((-second, first), dim=-1) * sin.view(shape)
