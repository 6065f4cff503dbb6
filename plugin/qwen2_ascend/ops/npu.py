"""torch_npu's fused operators behind the signatures of their plain twins.

What each computes, and the shapes, are in the twin's docstring: `attention.py`, `rms_norm.py`,
`rotary.py`, `swiglu.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch_npu  # pyright: ignore[reportMissingImports]  # installed where there is an NPU

from qwen2_ascend.ops import Ops

_COMPRESSED = 2048
"""Side of the mask that the causal modes take for sequences of any length."""
_CAUSAL_FROM_START, _CAUSAL_FROM_END = 2, 3
"""`sparse_mode`: the diagonal starts at the first key, or ends at the last."""


def npu_ops() -> Ops:
    """The fused operators."""
    return Ops(attention, cached_attention, rms_norm, rotary, swiglu)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float,
    dropout_p: float = 0.0,
    ends: Sequence[int] | None = None,
) -> torch.Tensor:
    """Flash attention: SBH for whole sequences, TND for packed documents; K and V not expanded."""
    s, b, heads, width = q.shape
    if ends is None:
        layout, inputs = "SBH", [x.flatten(2) for x in (q, k, v)]
    else:
        layout, inputs = "TND", [x.transpose(0, 1).flatten(0, 1) for x in (q, k, v)]
    context = torch_npu.npu_fusion_attention(
        inputs[0],
        inputs[1],
        inputs[2],
        heads,
        layout,
        atten_mask=_causal_mask(q.device),
        scale=softmax_scale,
        keep_prob=1.0 - dropout_p,
        actual_seq_qlen=ends,
        actual_seq_kvlen=ends,
        sparse_mode=_CAUSAL_FROM_START,
    )[0]
    if ends is None:
        return context
    return context.view(b, s, heads * width).transpose(0, 1).contiguous()


def cached_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    lengths: Sequence[int],
    softmax_scale: float,
) -> torch.Tensor:
    """The inference operator, which reads the cache as it lies; fp16 and bf16 only."""
    s, b, heads, width = q.shape
    # One query sees all its keys: the operator takes no mask then.
    context, _ = torch_npu.npu_fused_infer_attention_score(
        q.permute(1, 2, 0, 3).contiguous(),
        keys,
        values,
        actual_seq_lengths=[s] * b,
        actual_seq_lengths_kv=list(lengths),
        num_heads=heads,
        num_key_value_heads=keys.shape[1],
        scale=softmax_scale,
        input_layout="BNSD",
        atten_mask=_causal_mask(q.device) if s > 1 else None,
        sparse_mode=_CAUSAL_FROM_END if s > 1 else 0,
    )
    return context.permute(2, 0, 1, 3).reshape(s, b, heads * width)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """One kernel forward and one backward, in fp32 inside."""
    return torch_npu.npu_rms_norm(x, weight, epsilon=epsilon)[0]


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """One kernel instead of a product, a concatenation, a product and a sum."""
    s, b, *heads, width = x.shape
    shape = (s, b if cos.dim() == 3 else 1, 1, width)
    flat = x.reshape(s, b, -1, width)
    turned = torch_npu.npu_rotary_mul(flat, cos.view(shape), sin.view(shape))
    return turned.view(s, b, *heads, width)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """One kernel; the first half is the gate."""
    return torch_npu.npu_swiglu(x, dim=-1)


@cache
def _causal_mask(device: torch.device) -> torch.Tensor:
    """True above the diagonal, where a query must not look: `[2048, 2048]`, once per device."""
    ones = torch.ones(_COMPRESSED, _COMPRESSED, dtype=torch.bool, device=device)
    return torch.triu(ones, diagonal=1)
