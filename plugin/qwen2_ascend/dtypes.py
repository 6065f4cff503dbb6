"""torch's dtypes and what this project calls them."""

from __future__ import annotations

import torch

from qwen2_ascend.checkpoint.formats.torch_pt import DTYPES

TORCH_DTYPES: dict[str, torch.dtype] = {
    ours: getattr(torch, theirs) for ours, theirs in DTYPES.items()
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
