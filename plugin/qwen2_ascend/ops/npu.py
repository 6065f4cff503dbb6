"""torch_npu's fused operators behind the signatures of their plain twins.

What each computes, and the shapes, are in the twin's docstring: `attention.py`, `rms_norm.py`,
`rotary.py`, `swiglu.py`. The limits are those of the operators' documents for Atlas A2 and A3
(910B and 910C): op-plugin's `docs/zh/custom_APIs/torch_npu`, and for axes that are not contiguous
and the number of documents CANN's `aclnnFlashAttentionVarLenScore` and
`aclnnRotaryPositionEmbedding`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch_npu  # pyright: ignore[reportMissingImports]  # installed where there is an NPU
from torch.autograd.function import once_differentiable

from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.ops import Ops, checks
from qwen2_ascend.ops import attention as plain

_COMPRESSED = 2048
"""Side of the mask that the causal modes take for sequences of any length."""
_CAUSAL_FROM_START, _CAUSAL_FROM_END = 2, 3
"""`sparse_mode`: the diagonal starts at the first key, or ends at the last."""
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_HEADS, _MAX_WIDTH, _MAX_TOKENS, _MAX_DOCUMENTS = 256, 768, 2**20, 2048
"""Of npu_fusion_attention: query heads, head width, tokens of a sequence or of a packed batch,
documents of one."""
_MAX_INFERENCE_WIDTH, _MAX_HEADS_PER_GROUP, _MAX_DECODE_CAPACITY = 512, 64, 2**18
"""Of npu_fused_infer_attention_score; the last where there is one new token."""
_MAX_ROTARY_AXIS = 999
"""Of npu_rotary_mul: its batch, and its heads."""


def npu_ops() -> Ops:
    """The fused operators."""
    return Ops(attention, cached_attention, rms_norm, rotary, swiglu)


# --- attention ------------------------------------------------------------------------------------


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
    checks.check_attention(q, k, v, dropout_p, ends)
    _check_limits(q, ends)
    s, b, heads, width = q.shape
    # v is a view of linear_qkv's output. Backward keeps the operator's inputs: a copy of v instead
    # of that view lets the whole output go.
    if ends is None:
        layout, inputs = "SBH", [x.flatten(2).contiguous() for x in (q, k, v)]
    else:
        layout = "TND"
        inputs = [x.transpose(0, 1).flatten(0, 1).contiguous() for x in (q, k, v)]
    context = torch_npu.npu_fusion_attention(
        inputs[0],
        inputs[1],
        inputs[2],
        heads,
        layout,
        # Without a mask the operator ignores sparse_mode and attends to later tokens too.
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


def _check_limits(q: torch.Tensor, ends: Sequence[int] | None) -> None:
    """Raises UserError for what npu_fusion_attention does not take."""
    _check_dtype(q)
    s, b, heads, width = q.shape
    tokens = s if ends is None else s * b
    # torch_npu's own scaled_dot_product_attention keeps such widths from the operator too.
    aligned = q.dtype != torch.float32 or width % 4 == 0
    documents = 0 if ends is None else len(ends)
    fits = heads <= _MAX_HEADS and width <= _MAX_WIDTH and tokens <= _MAX_TOKENS
    if fits and aligned and documents <= _MAX_DOCUMENTS:
        return
    way_out = "--attention-backend unfused does"
    faults = {
        f"{heads} query heads on one rank, at most {_MAX_HEADS}: raise the tensor parallel size": (
            heads > _MAX_HEADS
        ),
        f"heads of {width}, at most {_MAX_WIDTH}: {way_out} more": width > _MAX_WIDTH,
        f"heads of {width} in fp32, only multiples of 4: use bf16; {way_out} all": not aligned,
        f"{tokens} tokens at once, at most {_MAX_TOKENS}: shorten the sequences": (
            tokens > _MAX_TOKENS
        ),
        f"{documents} packed documents at once, at most {_MAX_DOCUMENTS}: lower the micro-batch "
        "size or the sequence length": documents > _MAX_DOCUMENTS,
    }
    raise_if(f"npu_fusion_attention: {fault}." for fault, found in faults.items() if found)


@cache
def _causal_mask(device: torch.device) -> torch.Tensor:
    """True above the diagonal, where a query must not look: `[2048, 2048]`, once per device."""
    # Made during generation it must still serve training afterwards, whose backward keeps it.
    with torch.inference_mode(False):
        ones = torch.ones(_COMPRESSED, _COMPRESSED, dtype=torch.bool, device=device)
        return torch.triu(ones, diagonal=1)


def cached_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    lengths: Sequence[int],
    softmax_scale: float,
) -> torch.Tensor:
    """The inference operator, which reads the cache as it lies; the plain twin for fp32.

    Raises:
        ValueError: the cache is not contiguous.
    """
    checks.check_cached_attention(q, keys, values, lengths)
    if reason := _why_not_fused(q, keys):
        _say_once(f"npu_fused_infer_attention_score does not take {reason}")
        return plain.cached_attention(q, keys, values, lengths=lengths, softmax_scale=softmax_scale)
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("npu_fused_infer_attention_score takes a contiguous cache only.")
    s, b, heads, width = q.shape
    # One query sees every key that counts, and the operator takes neither mask nor mode then.
    alone = s == 1
    context, _ = torch_npu.npu_fused_infer_attention_score(
        q.permute(1, 2, 0, 3).contiguous(),
        keys,
        values,
        atten_mask=None if alone else _causal_mask(q.device),
        sparse_mode=0 if alone else _CAUSAL_FROM_END,
        actual_seq_lengths_kv=list(lengths),
        num_heads=heads,
        num_key_value_heads=keys.shape[1],
        scale=softmax_scale,
        input_layout="BNSD",
    )
    return context.permute(2, 0, 1, 3).reshape(s, b, heads * width)


def _why_not_fused(q: torch.Tensor, keys: torch.Tensor) -> str | None:
    """What of these the inference operator does not take; None if it takes them."""
    s, _, heads, width = q.shape
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"{q.dtype}"
    if width > _MAX_INFERENCE_WIDTH or width % 8:
        return f"heads of {width}"
    if heads > _MAX_HEADS or heads > keys.shape[1] * _MAX_HEADS_PER_GROUP:
        return f"{heads} query heads on {keys.shape[1]} groups"
    if s == 1 and keys.shape[2] > _MAX_DECODE_CAPACITY:
        return f"a cache of {keys.shape[2]} tokens"
    return None


@cache
def _say_once(reason: str) -> None:
    logging.getLogger(__name__).warning(
        "%s: attention over the cache is plain torch, on the device.", reason
    )


# --- norm, rotary, SwiGLU -------------------------------------------------------------------------


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """One kernel forward and one backward, in fp32 inside."""
    checks.check_rms_norm(x, weight)
    _check_dtype(x)
    return torch_npu.npu_rms_norm(x, weight, epsilon=epsilon)[0]


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """One kernel instead of a product, a concatenation, a product and a sum.

    Raises:
        UserError: more sequences or heads than the kernel takes.
    """
    checks.check_rotary(x, cos, sin)
    _check_dtype(x)
    s, b, width = x.shape[0], x.shape[1], x.shape[-1]
    if cos.dim() == 2 or b == 1:
        # The operator's batch: every sequence and every group of heads, a view of linear_qkv's
        # output, which it reads as it lies.
        batched, rows = x.flatten(1, -3), (s, 1, 1, width)
    else:
        batched, rows = x.reshape(s, b, -1, width), (s, b, 1, width)
    if max(batched.shape[1:3]) > _MAX_ROTARY_AXIS:
        raise UserError(
            f"npu_rotary_mul takes less than {_MAX_ROTARY_AXIS + 1} sequences and heads at once; "
            f"got {batched.shape[1]} and {batched.shape[2]}: lower the micro-batch size."
        )
    turned: torch.Tensor = _Rotary.apply(batched, cos.view(rows), sin.view(rows))  # pyright: ignore
    return turned.view(x.shape)


class _Rotary(torch.autograd.Function):
    """npu_rotary_mul, keeping cos and sin for backward but not, as its own autograd does, x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        assert not (cos.requires_grad or sin.requires_grad), "the tables are constants"
        ctx.save_for_backward(cos, sin)
        return torch_npu.npu_rotary_mul(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # pyright: ignore
        cos, sin = ctx.saved_tensors
        # x is there for the gradients of cos and sin, which nobody wants; x's own needs it not.
        return torch_npu.npu_rotary_mul_backward(grad, grad, cos, sin)[0], None, None


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """One kernel; the first half is the gate."""
    checks.check_swiglu(x)
    _check_dtype(x)
    return torch_npu.npu_swiglu(x.contiguous(), dim=-1)


def _check_dtype(x: torch.Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise UserError(
            f"{x.dtype} is not a dtype of torch_npu's fused operators, which take float16, "
            "bfloat16 and float32; the plain ones (backend 'torch') take others."
        )
