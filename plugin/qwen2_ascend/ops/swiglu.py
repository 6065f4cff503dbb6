"""SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from qwen2_ascend.ops.checks import check_swiglu


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up.

    Args:
        x: `[..., 2 * f]`, the gate in the first half, up in the second.

    Returns:
        `[..., f]`.

    Raises:
        ValueError: the width is odd.
    """
    check_swiglu(x)
    gate, up = x.chunk(2, dim=-1)
    return silu(gate) * up
