"""torch_npu's fused operators behind the signatures of their plain twins.

What each computes, and the shapes, are in the twin's docstring: `attention.py`, `rms_norm.py`,
`rotary.py`, `swiglu.py`. The limits are those of the operators' documents for Atlas A2 and A3
(910B and 910C): op-plugin's `docs/zh/custom_APIs/torch_npu`, and for axes that are not contiguous
and the number of documents CANN's `aclnnFlashAttentionVarLenScore` and
`aclnnRotaryPositionEmbedding`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch_npu  # pyright: ignore[reportMissingImports]  # installed where there is an NPU
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.ops import attention as plain
from qwen2_ascend.ops import checks
from qwen2_ascend.ops.blocks import Block, Gradients, PartialAttention, PartialOutput, TokenSlice

_COMPRESSED = 2048
"""Side of the mask that the causal modes take for sequences of any length."""
_CAUSAL_FROM_START, _CAUSAL_FROM_END = 2, 3
"""`sparse_mode`: the diagonal starts at the first key, or ends at the last."""
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_HEADS, _MAX_WIDTH, _MAX_TOKENS = 256, 768, 2**20
"""The most query heads, head width and tokens of a sequence for npu_fusion_attention."""
_MAX_PACKED_TOKENS, _MAX_DOCUMENTS = 10**6, 2048
"""The most tokens of a packed batch (CANN's gradient says that more may time out) and documents."""
_MAX_STRIDE = 65_535
"""Numbers between a sequence's tokens that npu_fusion_attention steps over; of more it transposes
its inputs and results, forward and backward, in further kernels."""
_REPEATED = 8
"""How often npu_fusion_attention gives the maximum and the sum of each row."""
_MAX_INFERENCE_WIDTH, _MAX_HEADS_PER_GROUP, _MAX_DECODE_CAPACITY = 512, 64, 2**18
"""Limits of npu_fused_infer_attention_score; the last where there is one new token. CANN refuses
widths that are no multiple of 16 where there are more tokens; this code refuses them always."""
_MAX_ROTARY_AXIS = 999
"""The largest batch and number of heads of npu_rotary_mul."""


# --- attention ------------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    dropout_p: float = 0.0,
    ends: Sequence[int] | None = None,
) -> Tensor:
    """Flash attention: whole sequences or packed documents (TND); K and V are not expanded.

    Whole sequences stay as they lie (SBH) while the operator takes that without transposing them.
    """
    checks.check_attention(q, k, v, dropout_p, ends)
    s, b, heads, width = q.shape
    _check_limits(q, s if ends is None else s * b, 0 if ends is None else len(ends))
    # v is a view of linear_qkv's output. Backward keeps the operator's inputs: a copy of v instead
    # of that view lets the whole output go.
    if ends is None and b * heads * _padded(width) <= _MAX_STRIDE:
        layout, inputs = "SBH", [x.flatten(2).contiguous() for x in (q, k, v)]
    elif ends is None:
        layout, inputs = "BSND", [x.transpose(0, 1).contiguous() for x in (q, k, v)]
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
    if layout == "SBH":
        return context
    return context.view(b, s, heads * width).transpose(0, 1).contiguous()


def _padded(width: int) -> int:
    """The head width that the operator's gradient computes with; forward's is never more."""
    multiple = 16 if width < 128 else 128
    return -(-width // multiple) * multiple


def _check_limits(q: Tensor, tokens: int, documents: int) -> None:
    """Raises UserError for what npu_fusion_attention does not take.

    Args:
        q: `[s, b, np, hn]`.
        tokens: of a sequence, or of all packed ones.
        documents: packed ones; 0 for whole sequences.
    """
    _check_dtype(q)
    heads, width = q.shape[2:]
    # torch_npu's own scaled_dot_product_attention keeps such widths from the operator too.
    aligned = q.dtype != torch.float32 or width % 4 == 0
    most = _MAX_PACKED_TOKENS if documents else _MAX_TOKENS
    fits = heads <= _MAX_HEADS and width <= _MAX_WIDTH and tokens <= most
    if fits and aligned and documents <= _MAX_DOCUMENTS:
        return
    way_out = "--attention-backend unfused does"
    faults = {
        f"{heads} query heads on one rank, at most {_MAX_HEADS}: raise the tensor parallel size": (
            heads > _MAX_HEADS
        ),
        f"heads of {width}, at most {_MAX_WIDTH}: {way_out} more": width > _MAX_WIDTH,
        f"heads of {width} in fp32, only multiples of 4: use bf16; {way_out} all": not aligned,
        f"{tokens} tokens at once, at most {most}: shorten the sequences": tokens > most,
        f"{documents} packed documents at once, at most {_MAX_DOCUMENTS}: lower the micro-batch "
        "size or the sequence length": documents > _MAX_DOCUMENTS,
    }
    raise_if(f"npu_fusion_attention: {fault}." for fault, found in faults.items() if found)


@cache
def _causal_mask(device: torch.device) -> Tensor:
    """True above the diagonal, where a query must not look: `[2048, 2048]`, once per device."""
    # Made during generation it must still serve training afterwards, whose backward keeps it.
    with torch.inference_mode(False):
        ones = torch.ones(_COMPRESSED, _COMPRESSED, dtype=torch.bool, device=device)
        return torch.triu(ones, diagonal=1)


# --- attention over blocks ------------------------------------------------------------------------


def _partial(
    q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block], *, softmax_scale: float
) -> list[PartialOutput]:
    launch = _Launch.of(blocks, q, k)
    context, largest, total, *_ = torch_npu.npu_fusion_attention(
        launch.laid_out(q, launch.queries),
        launch.laid_out(k, launch.keys),
        launch.laid_out(v, launch.keys),
        q.shape[2],
        launch.layout,
        scale=softmax_scale,
        atten_mask=launch.mask(q.device),
        sparse_mode=launch.sparse_mode,
        actual_seq_qlen=launch.query_ends,
        actual_seq_kvlen=launch.key_ends,
        **({"softmax_layout": "TND"} if launch.layout == "TND" else {}),
    )
    lse = largest[..., 0] + total[..., 0].log()
    contexts = launch.taken_apart(context, launch.queries, q.shape[2])
    parts = zip(launch.queries, contexts, launch.statistics_apart(lse), strict=True)
    return [PartialOutput(place.rows, place.tokens, context, lse) for place, context, lse in parts]


def _partial_backward(
    d_context: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: Tensor,
    lse: Tensor,
    blocks: Sequence[Block],
    *,
    softmax_scale: float,
    into: Gradients,
) -> None:
    launch = _Launch.of(blocks, q, k)
    # exp(score - largest) / sum is exp(score - lse) / 1
    statistics = launch.statistics(lse)
    d_q, d_k, d_v, *_ = torch_npu.npu_fusion_attention_grad(
        launch.laid_out(q, launch.queries),
        launch.laid_out(k, launch.keys),
        launch.laid_out(v, launch.keys),
        launch.laid_out(d_context, launch.queries),
        q.shape[2],
        launch.layout,
        softmax_max=statistics,
        softmax_sum=torch.ones_like(statistics),
        attention_in=launch.laid_out(context, launch.queries),
        scale_value=softmax_scale,
        atten_mask=launch.mask(q.device),
        sparse_mode=launch.sparse_mode,
        actual_seq_qlen=launch.query_ends,
        actual_seq_kvlen=launch.key_ends,
        **({"softmax_layout": "TND"} if launch.layout == "TND" else {}),
    )
    shares = [
        launch.taken_apart(share, places, heads)
        for share, places, heads in (
            (d_q, launch.queries, q.shape[2]),
            (d_k, launch.keys, k.shape[2]),
            (d_v, launch.keys, k.shape[2]),
        )
    ]
    into.add(launch.queries, launch.keys, shares)


partial_attention = PartialAttention(_partial, _partial_backward)
"""Partial attention by npu_fusion_attention, whose maxima and sums give the log-sum-exp."""


def _schema(operator: str) -> str:
    """The arguments that an operator of the installed torch_npu takes."""
    return str(getattr(torch.ops.npu, operator).default._schema)


@cache
def packed_blocks_faults() -> list[str]:
    """Why this torch_npu cannot attend over blocks of packed documents.

    Of those the operator gives the rows' numbers head by head within each document, in a tensor
    that says [T, N, 8], unless softmax_layout says otherwise.
    """
    operators = "npu_fusion_attention", "npu_fusion_attention_grad"
    if all("softmax_layout" in _schema(name) for name in operators):
        return []
    return [
        f"npu_fusion_attention of torch_npu {torch_npu.__version__} has no softmax_layout, which "
        "packed documents need under context parallelism; install Ascend Extension for PyTorch "
        "7.2.0 or later with CANN 8.3.RC1 or later, or use --context-parallel-algo "
        "ulysses_cp_algo."
    ]


class _Launch(NamedTuple):
    """Blocks as one call: SBH for a single one, else TND with each block as a document."""

    blocks: Sequence[Block]
    queries: list[TokenSlice]
    """The slices of neighbouring blocks are joined, so that few views are taken."""
    keys: list[TokenSlice]

    @classmethod
    def of(cls, blocks: Sequence[Block], q: Tensor, k: Tensor) -> _Launch:
        """Raises UserError for what the operator does not take."""
        launch = cls(
            blocks,
            _runs([TokenSlice(block.rows, block.queries) for block in blocks]),
            _runs([TokenSlice(block.rows, block.keys) for block in blocks]),
        )
        if launch.layout == "TND":
            raise_if(packed_blocks_faults())
        both = launch.queries, launch.keys
        tokens = max(sum(len(place.tokens) for place in places) for places in both)
        _check_limits(q, tokens, 0 if launch.layout == "SBH" else len(blocks))
        return launch

    @property
    def layout(self) -> str:
        return "SBH" if len(self.blocks) == 1 else "TND"

    @property
    def sparse_mode(self) -> int:
        return _CAUSAL_FROM_END if self.blocks[0].causal else 0

    def mask(self, device: torch.device) -> Tensor | None:
        """None where every query sees every key of its block."""
        return _causal_mask(device) if self.blocks[0].causal else None

    @property
    def query_ends(self) -> list[int] | None:
        """Where each document's queries end."""
        return self._ends(block.queries for block in self.blocks)

    @property
    def key_ends(self) -> list[int] | None:
        """Where each document's keys end."""
        return self._ends(block.keys for block in self.blocks)

    def _ends(self, ranges: Iterable[range]) -> list[int] | None:
        return list(accumulate(map(len, ranges))) if self.layout == "TND" else None

    def laid_out(self, x: Tensor, places: list[TokenSlice]) -> Tensor:
        """Those tokens of x, `[s, b, n, hn]`, in the call's layout."""
        if self.layout == "SBH":
            return places[0].of(x).flatten(2).contiguous()
        return torch.cat([place.of(x).squeeze(1) for place in places])

    def taken_apart(self, result: Tensor, places: list[TokenSlice], heads: int) -> list[Tensor]:
        """`laid_out` back: `[tokens, rows, n, hn]` of each place."""
        if self.layout == "SBH":
            return [result.unflatten(2, (heads, -1))]
        sizes = [len(place.tokens) for place in places]
        return [part.unsqueeze(1) for part in result.split(sizes)]

    def statistics(self, lse: Tensor) -> Tensor:
        """The queries' part of `[s, b, np]` as the operator has its rows' numbers: eight times."""
        if self.layout == "SBH":
            rows = self.queries[0].of(lse).permute(1, 2, 0)
        else:
            rows = torch.cat([place.of(lse).squeeze(1) for place in self.queries])
        return rows.unsqueeze(-1).repeat(*[1] * rows.dim(), _REPEATED)

    def statistics_apart(self, rows: Tensor) -> list[Tensor]:
        """The operator's rows' numbers as `[queries, rows, np]` of each place."""
        if self.layout == "SBH":
            return [rows.permute(2, 0, 1)]
        sizes = [len(place.tokens) for place in self.queries]
        return [part.unsqueeze(1) for part in rows.split(sizes)]


def _runs(places: list[TokenSlice]) -> list[TokenSlice]:
    """The same, neighbours as one."""
    runs: list[TokenSlice] = []
    for rows, tokens in places:
        last = runs[-1] if runs else None
        if last and last.rows == rows and last.tokens.stop == tokens.start:
            runs[-1] = TokenSlice(rows, range(last.tokens.start, tokens.stop))
        else:
            runs.append(TokenSlice(rows, tokens))
    return runs


# --- attention over a cache -----------------------------------------------------------------------


def cached_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    lengths: Sequence[int],
    softmax_scale: float,
) -> Tensor:
    """The inference operator, which reads the cache as it lies; the plain twin for fp32.

    Raises:
        ValueError: the cache is not contiguous.
    """
    checks.check_cached_attention(q, keys, values, lengths)
    if reason := _why_not_fused(q, keys):
        _warn_once(f"npu_fused_infer_attention_score does not take {reason}")
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


def _why_not_fused(q: Tensor, keys: Tensor) -> str | None:
    """What of these the inference operator does not take; None if it takes them."""
    s, _, heads, width = q.shape
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"{q.dtype}"
    if width > _MAX_INFERENCE_WIDTH or width % 16:
        return f"heads of {width}"
    if heads > _MAX_HEADS or heads > keys.shape[1] * _MAX_HEADS_PER_GROUP:
        return f"{heads} query heads on {keys.shape[1]} groups"
    if s == 1 and keys.shape[2] > _MAX_DECODE_CAPACITY:
        return f"a cache of {keys.shape[2]} tokens"
    return None


@cache
def _warn_once(reason: str) -> None:
    logging.getLogger(__name__).warning(
        "%s: attention over the cache is plain torch, on the device.", reason
    )


# --- norm, rotary, SwiGLU -------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """One kernel forward and one backward, in fp32 inside."""
    checks.check_rms_norm(x, weight)
    _check_dtype(x)
    return torch_npu.npu_rms_norm(x, weight, epsilon=epsilon)[0]


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One kernel instead of a product, a concatenation, a product and a sum.

    Raises:
        UserError: more sequences or heads than the kernel takes.
    """
    checks.check_rotary(x, cos, sin)
    _check_dtype(x)
    s, b, width = x.shape[0], x.shape[1], x.shape[-1]
    if cos.dim() == 2 or b == 1:
        # The operator's batch: every sequence and every group of heads. x is a view of linear_qkv's
        # output, which CANN makes contiguous before the kernel: a copy of x here would be no more.
        batched, rows = x.flatten(1, -3), (s, 1, 1, width)
    else:
        batched, rows = x.reshape(s, b, -1, width), (s, b, 1, width)
    if max(batched.shape[1:3]) > _MAX_ROTARY_AXIS:
        raise UserError(
            f"npu_rotary_mul takes less than {_MAX_ROTARY_AXIS + 1} sequences and heads at once; "
            f"got {batched.shape[1]} and {batched.shape[2]}: lower the micro-batch size."
        )
    turned: Tensor = _Rotary.apply(batched, cos.view(rows), sin.view(rows))  # pyright: ignore
    return turned.view(x.shape)


class _Rotary(torch.autograd.Function):
    """npu_rotary_mul, keeping cos and sin for backward but not, as its own autograd does, x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        assert not (cos.requires_grad or sin.requires_grad), "the tables are constants"
        ctx.save_for_backward(cos, sin)
        return torch_npu.npu_rotary_mul(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        cos, sin = ctx.saved_tensors
        # x is there for the gradients of cos and sin, which nobody wants; x's own needs it not.
        return torch_npu.npu_rotary_mul_backward(grad, grad, cos, sin)[0], None, None


def swiglu(x: Tensor) -> Tensor:
    """One kernel; the first half is the gate."""
    checks.check_swiglu(x)
    _check_dtype(x)
    return torch_npu.npu_swiglu(x.contiguous(), dim=-1)


def _check_dtype(x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise UserError(
            f"{x.dtype} is not a dtype of torch_npu's fused operators, which take float16, "
            "bfloat16 and float32; the plain ones (backend 'torch') take others."
        )
