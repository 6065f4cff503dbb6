"""What torch_npu's fused products and exchanges take; without torch, for checks at start."""

from __future__ import annotations

RANKS = (2, 4, 8)
"""Sizes of a group; an Atlas A2 (910B) has links between so many cards, an A3 (910C) more."""
COLUMNS = range(256, 65535)
"""Columns of one rank's input, of npu_all_gather_base_mm and npu_mm_reduce_scatter_base."""
DTYPES = ("bf16", "fp16")
