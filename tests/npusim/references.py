"""What the operators mean, in plain PyTorch: torch_npu's documents turned into code.

A reference gets a list of the operator's outputs, not yet computed, and by keyword its inputs, all
as host views; it returns the values for the outputs. It refuses what the documents do not allow,
or leave open: on a device such a call would fail, or quietly give other numbers.

Letters: B sequences, N heads, S tokens of a sequence, D head width, T tokens of a packed batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import silu
from torch.utils._pytree import tree_map_only

NPU_REFERENCES: dict[str, Callable[..., object]] = {}
ATEN_REFERENCES: dict[str, Callable[..., object]] = {}

COMPRESSED = 2048
"""Side of the mask that sparse modes 2, 3 and 4 take for any length."""


class InvalidCall(ValueError):
    """A call that the operator's documents rule out."""


def reference(*names: str):
    """Decorator: registers the meaning of npu:: operators."""

    def register(function: Callable[..., object]):
        NPU_REFERENCES.update(dict.fromkeys(names, function))
        return function

    return register


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidCall(message)


# --- attention ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """The arguments that attention, its gradient and the inference operator share."""

    query: Tensor
    key: Tensor
    value: Tensor
    layout: str
    num_heads: int
    num_key_value_heads: int
    scale: float
    mask: Tensor | None = None
    sparse_mode: int = 0
    pre_tokens: int = 2**31 - 1
    next_tokens: int = 2**31 - 1
    zero_hidden_rows: bool = False
    query_ends: Sequence[int] | None = None
    """Where each sequence of a packed batch ends, cumulative."""
    key_ends: Sequence[int] | None = None
    key_lengths: Sequence[int] | None = None
    """How many keys of each sequence count, of a batch with a cache."""
    softmax_layout: str = ""
    """"TND" where a packed batch's statistics lie token by token."""
    keep_prob: float = 1.0
    seed: int = 0
    offset: int = 0

    def check(self) -> None:
        query, key, value = self.query, self.key, self.value
        _require(query.dtype == key.dtype == value.dtype, "query, key, value differ in dtype")
        _require(query.dtype != torch.float64, "float64 is not supported")
        _require(key.shape[:-1] == value.shape[:-1], "key and value differ in shape")
        width = _head_width(query, self.layout, self.num_heads)
        key_width = _head_width(key, self.layout, self.num_key_value_heads)
        _require(width == key_width, f"head width is {width} in query and {key_width} in key")
        _require(width <= 768, f"head width {width} is more than 768")
        _require(self.num_heads <= 256, f"{self.num_heads} query heads are more than 256")
        _require(
            self.num_heads % self.num_key_value_heads == 0,
            f"{self.num_heads} query heads are no multiple of {self.num_key_value_heads}",
        )
        allowed = ("", "TND") if self.layout == "TND" else ("",)
        _require(
            self.softmax_layout in allowed,
            f"softmax_layout {self.softmax_layout} is not one of {allowed}",
        )
        if self.layout == "TND":
            _check_ends(self.query_ends, query.shape[0], "actual_seq_qlen")
            _check_ends(self.key_ends, key.shape[0], "actual_seq_kvlen")

    def sequences(self) -> Iterator[Scores]:
        """The scores of every sequence, in order."""
        drawn = 0
        queries = by_sequence(self.query, self.layout, self.num_heads, self.query_ends)
        groups = self.num_key_value_heads
        keys = by_sequence(self.key, self.layout, groups, self.key_ends)
        values = by_sequence(self.value, self.layout, groups, self.key_ends)
        self._check_own_mask(max(x.shape[1] for x in queries), max(x.shape[1] for x in keys))
        for index, (query, key, value) in enumerate(zip(queries, keys, values, strict=True)):
            if self.key_lengths is not None:
                key, value = key[:, : self.key_lengths[index]], value[:, : self.key_lengths[index]]
            hidden = self._hidden(index, query.shape[1], key.shape[1])
            repeats = query.shape[0] // key.shape[0]
            key, value = key.float(), value.float()
            expanded = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
            scores = query.float() @ expanded[0].transpose(-1, -2) * self.scale
            if hidden is not None:
                scores = scores.masked_fill(hidden, -torch.inf)
            kept = None
            if self.keep_prob < 1:
                shape = (*scores.shape[:2], _up_to_multiple(scores.shape[2], 16))
                count = shape[0] * shape[1] * shape[2]
                bits = kept_weights(self.seed, self.offset, drawn, count, self.keep_prob)
                kept = bits.view(shape)[..., : scores.shape[2]]
                drawn += count
            yield Scores(query.float(), *expanded, scores, kept)

    def _hidden(self, index: int, num_queries: int, num_keys: int) -> Tensor | None:
        """True where a query must not see a key; None when it sees all."""
        if self.mask is None:
            return None  # whatever sparse_mode says: attention is full, not causal
        distance = torch.arange(num_keys) - torch.arange(num_queries)[:, None]
        from_corner = distance - (num_keys - num_queries)
        if self.sparse_mode in (2, 3, 4):
            _check_compressed(self.mask)
        if self.sparse_mode == 0:
            outside = (distance > self.next_tokens) | (distance < -self.pre_tokens)
            return self._own_mask(index, num_queries, num_keys) | outside
        if self.sparse_mode == 1:
            return self._own_mask(index, num_queries, num_keys)
        if self.sparse_mode == 2:
            return distance > 0
        if self.sparse_mode == 3:
            return from_corner > 0
        if self.sparse_mode == 4:
            return (from_corner > self.next_tokens) | (from_corner < -self.pre_tokens)
        raise NotImplementedError(f"sparse_mode={self.sparse_mode}")

    def _check_own_mask(self, longest_query: int, longest_key: int) -> None:
        """Where no compressed mask is meant, the mask has a place for each query and key."""
        if self.mask is None or self.sparse_mode not in (0, 1):
            return
        found, wanted = tuple(self.mask.shape[-2:]), (longest_query, longest_key)
        _require(found == wanted, f"a mask {found} in sparse mode {self.sparse_mode}, not {wanted}")

    def _own_mask(self, index: int, num_queries: int, num_keys: int) -> Tensor:
        """This sequence's part of a mask [S, S] or [B or 1, N or 1, S, S]."""
        assert self.mask is not None
        mask = self.mask.bool()
        if mask.dim() == 4:
            mask = mask[index if mask.shape[0] > 1 else 0]
        return mask[..., :num_queries, :num_keys]


def kept_weights(seed: int, offset: int, start: int, count: int, keep_prob: float) -> Tensor:
    """Which of `count` attention weights dropout leaves, from the `start`-th on: bool `[count]`.

    Every weight takes a byte of Philox4x32 (Salmon et al. 2011) with 7 rounds, whose counter begins
    at a sixteenth of the offset, and stays if the byte is at most keep_prob * 255. The weights are
    those of one sequence after the other, `[N, S, keys]`, the keys filled up to a multiple of 16.
    So a share of (floor(keep_prob * 255) + 1) / 256 stays, and is divided by keep_prob.
    """
    assert start % 16 == 0 == count % 16, "whole blocks of 16 bytes"
    blocks = np.arange(count // 16, dtype=np.uint64) + np.uint64(-(-offset // 16) + start // 16)
    low, word = np.uint64(0xFFFFFFFF), np.uint64(32)
    counter = [blocks & low, blocks >> word, np.zeros_like(blocks), np.zeros_like(blocks)]
    key = [seed % 2**32, seed // 2**32 % 2**32]
    for _ in range(7):
        first = counter[0] * np.uint64(0xD2511F53)
        second = counter[2] * np.uint64(0xCD9E8D57)
        counter = [
            (second >> word) ^ counter[1] ^ np.uint64(key[0]),
            second & low,
            (first >> word) ^ counter[3] ^ np.uint64(key[1]),
            first & low,
        ]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    drawn = np.stack(counter, axis=-1).astype("<u4").reshape(-1).view(np.uint8)
    return torch.from_numpy(drawn <= keep_prob * 255)


def _up_to_multiple(size: int, of: int) -> int:
    return -(-size // of) * of


class Scores(NamedTuple):
    """The scores of one sequence in fp32, with keys and values expanded to the query heads."""

    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor
    """[N, S, keys], masked with -inf."""
    kept: Tensor | None
    """Which attention weights dropout leaves; None for all."""

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Largest score and sum of the exponentials of a row, each [N, S, 1]."""
        largest = self.scores.amax(-1, keepdim=True)
        return largest, (self.scores - largest).exp().sum(-1, keepdim=True)


def _head_width(x: Tensor, layout: str, heads: int) -> int:
    if layout in ("BSH", "SBH"):
        _require(x.shape[2] % heads == 0, f"{heads} heads do not divide {x.shape[2]} columns")
        return x.shape[2] // heads
    found = x.shape[1] if layout in ("BNSD", "TND") else x.shape[2]
    _require(
        found == heads, f"the shape {tuple(x.shape)} ({layout}) has {found} heads, not {heads}"
    )
    return x.shape[-1]


def _check_ends(ends: Sequence[int] | None, tokens: int, name: str) -> None:
    _require(bool(ends), f"layout TND needs {name}")
    assert ends is not None
    _require(len(ends) <= 2048, f"{name} has {len(ends)} sequences, more than 2048")
    _require(ends[0] != 0, f"{name} begins with 0: it takes the ends of the sequences only")
    rising = all(a <= b for a, b in itertools.pairwise(ends))
    _require(rising, f"{name} is not cumulative: {list(ends)}")
    _require(ends[-1] == tokens, f"{name} ends at {ends[-1]} and there are {tokens} tokens")


@cache
def _compressed_mask() -> Tensor:
    return torch.ones(COMPRESSED, COMPRESSED).triu(1).bool()


def _check_compressed(mask: Tensor) -> None:
    wanted = _compressed_mask()
    right = mask.shape[-2:] == wanted.shape and torch.equal(mask.bool().view_as(wanted), wanted)
    _require(right, "sparse modes 2, 3, 4 take the 2048 x 2048 mask, True above the diagonal")


def by_sequence(x: Tensor, layout: str, heads: int, ends: Sequence[int] | None) -> list[Tensor]:
    """Views [N, S, D] of every sequence of `x`."""
    if layout == "TND":
        assert ends is not None
        starts = [0, *ends[:-1]]
        return [x[a:b].transpose(0, 1) for a, b in zip(starts, ends, strict=True)]
    if layout == "SBH":
        return list(x.unflatten(2, (heads, -1)).permute(1, 2, 0, 3))
    if layout == "BSH":
        return list(x.unflatten(2, (heads, -1)).transpose(1, 2))
    return list(x if layout == "BNSD" else x.transpose(1, 2))


def _statistics_by_sequence(x: Tensor, call: AttentionCall) -> list[Tensor]:
    """Views [N, S, 8] of softmax_max or softmax_sum."""
    if call.layout != "TND":
        return by_sequence(x, "BNSD", 0, None)
    ends = call.query_ends
    assert ends is not None
    if call.softmax_layout == "TND":
        return by_sequence(x, "TND", 0, ends)
    # whatever the shape says, [T, N, 8]: the numbers of each sequence lie head by head
    heads = call.num_heads
    rows = x.view(-1, x.shape[-1])
    bounds = itertools.pairwise((0, *ends))
    return [rows[a * heads : b * heads].unflatten(0, (heads, -1)) for a, b in bounds]


def _attend(call: AttentionCall, output: Tensor, largest: Tensor | None, total: Tensor | None):
    """Fills the output and, where wanted, the rows' statistics for the gradient."""
    places = by_sequence(output, call.layout, call.num_heads, call.query_ends)
    for index, sequence in enumerate(call.sequences()):
        row_largest, row_total = sequence.statistics()
        weights = (sequence.scores - row_largest).exp() / row_total
        if call.zero_hidden_rows:
            weights = weights.masked_fill(row_largest == -torch.inf, 0.0)
        if sequence.kept is not None:
            weights = weights * sequence.kept / call.keep_prob
        places[index].copy_(weights @ sequence.value)
        for statistic, rows in ((largest, row_largest), (total, row_total)):
            if statistic is not None:
                _statistics_by_sequence(statistic, call)[index].copy_(rows)


def _training_call(
    *,
    query,
    key,
    value,
    head_num,
    input_layout,
    atten_mask,
    pre_tockens,
    next_tockens,
    sparse_mode,
    inner_precise,
    actual_seq_qlen,
    actual_seq_kvlen,
    keep_prob,
    **others,
) -> AttentionCall:
    for name in ("pse", "padding_mask", "prefix", "sink", "dropout_mask"):
        if others.get(name) is not None:
            raise NotImplementedError(f"{name} is not simulated")
    call = AttentionCall(
        query=query,
        key=key,
        value=value,
        layout=input_layout,
        num_heads=head_num,
        num_key_value_heads=_key_value_heads(query, key, input_layout, head_num),
        scale=others["scale"] if "scale" in others else others["scale_value"],
        mask=atten_mask,
        sparse_mode=sparse_mode,
        pre_tokens=pre_tockens,
        next_tokens=next_tockens,
        zero_hidden_rows=sparse_mode in (3, 4) or inner_precise == 2,
        query_ends=_as_list(actual_seq_qlen),
        key_ends=_as_list(actual_seq_kvlen),
        softmax_layout=others.get("softmax_layout") or "",
        keep_prob=keep_prob,
        seed=_as_int(others.get("seed")),
        offset=_as_int(others.get("offset")),
    )
    call.check()
    return call


def _key_value_heads(query: Tensor, key: Tensor, layout: str, heads: int) -> int:
    if layout in ("BNSD", "TND"):
        return key.shape[1]
    if layout == "BSND":
        return key.shape[2]
    return key.shape[2] // _head_width(query, layout, heads)


def _as_list(ends: Tensor | Sequence[int] | None) -> list[int] | None:
    return ends.tolist() if isinstance(ends, Tensor) else list(ends) if ends else None


def _as_int(value: Tensor | int | None) -> int:
    return (
        int(value.flatten()[0]) if isinstance(value, Tensor) and value.numel() else int(value or 0)
    )


@reference("npu_fusion_attention", "npu_fusion_attention_v3")
def _(outputs, **inputs):
    # The outputs' seed and offset are those that torch_npu drew for the dropout of this call.
    call = _training_call(**{**inputs, "seed": outputs[4], "offset": outputs[5]})
    results = tuple(torch.empty_like(output) for output in outputs[:3])
    _attend(call, *results)
    return results


@reference("npu_fusion_attention_grad", "npu_fusion_attention_grad_v3")
def _(_outputs, *, dy, softmax_max, softmax_sum, attention_in, **inputs):
    """The gradient as flash attention takes it: from the output and the rows' statistics."""
    call = _training_call(**inputs)
    layout, ends = call.layout, call.query_ends
    gradients = [
        torch.zeros_like(x, dtype=torch.float32) for x in (call.query, call.key, call.value)
    ]
    d_query = by_sequence(gradients[0], layout, call.num_heads, ends)
    d_key = by_sequence(gradients[1], layout, call.num_key_value_heads, call.key_ends)
    d_value = by_sequence(gradients[2], layout, call.num_key_value_heads, call.key_ends)
    d_outputs = by_sequence(dy.float(), layout, call.num_heads, ends)
    outputs = by_sequence(attention_in.float(), layout, call.num_heads, ends)
    largest = _statistics_by_sequence(softmax_max, call)
    totals = _statistics_by_sequence(softmax_sum, call)
    for index, sequence in enumerate(call.sequences()):
        weights = (sequence.scores - largest[index][..., :1]).exp() / totals[index][..., :1]
        if call.zero_hidden_rows:
            weights = weights.nan_to_num(0.0)
        kept = 1.0 if sequence.kept is None else sequence.kept / call.keep_prob
        d_output = d_outputs[index]
        d_weights = d_output @ sequence.value.transpose(-1, -2) * kept
        row = (d_output * outputs[index]).sum(-1, keepdim=True)
        d_scores = weights * (d_weights - row) * call.scale
        d_query[index].copy_(d_scores @ sequence.key)
        d_key[index].copy_(_per_group(d_scores.transpose(-1, -2) @ sequence.query, d_key[index]))
        d_values = (weights * kept).transpose(-1, -2) @ d_output
        d_value[index].copy_(_per_group(d_values, d_value[index]))
    return tuple(gradients)


def _per_group(gradient: Tensor, like: Tensor) -> Tensor:
    """Sums over the query heads that share one key and value head."""
    return gradient.unflatten(0, (like.shape[0], -1)).sum(1)


_INFERENCE_INPUTS = {"query", "key", "value", "atten_mask", "actual_seq_lengths"}
_INFERENCE_INPUTS |= {"actual_seq_lengths_kv"}


@reference("npu_fused_infer_attention_score")
def _(outputs, **inputs):
    output, log_sum = outputs
    for name, given in inputs.items():
        if name not in _INFERENCE_INPUTS and isinstance(given, (Tensor, list)):
            raise NotImplementedError(f"{name} is not simulated")
    call = _inference_call(**inputs)
    result = torch.empty_like(output)
    if not inputs["softmax_lse_flag"]:
        _attend(call, result, None, None)
        return result, torch.zeros_like(log_sum)
    largest, total = torch.empty_like(log_sum), torch.empty_like(log_sum)
    _attend(call, result, largest, total)
    return result, largest + total.log()


def _inference_call(
    *,
    query,
    key,
    value,
    atten_mask,
    num_heads,
    num_key_value_heads,
    scale,
    input_layout,
    sparse_mode,
    pre_tokens,
    next_tokens,
    inner_precise,
    actual_seq_lengths,
    actual_seq_lengths_kv,
    **_,
) -> AttentionCall:
    _require(query.dtype in (torch.float16, torch.bfloat16), f"{query.dtype} is not supported")
    packed = input_layout == "TND"
    if not packed and actual_seq_lengths is not None:
        raise NotImplementedError("actual_seq_lengths outside TND is not simulated")
    contiguous = all(x.is_contiguous() for x in (query, key, value))
    _require(contiguous, "query, key and value must be contiguous")
    one_token = not packed and query.shape[input_layout.index("S")] == 1
    if one_token:
        sparse_mode, pre_tokens, next_tokens = 1, 2**31 - 1, 2**31 - 1  # they have no effect
        capacity = key.shape[input_layout.index("S")]
        _require(capacity <= 262144, f"a cache of {capacity} tokens is more than 262144")
    elif sparse_mode != 0:
        _require(atten_mask is not None, f"sparse_mode={sparse_mode} needs an atten_mask")
    lengths = None
    if not packed and actual_seq_lengths_kv is not None:
        lengths = _per_sequence(actual_seq_lengths_kv, query.shape[input_layout.index("B")])
        longest = key.shape[input_layout.index("S")]
        _require(max(lengths) <= longest, f"lengths {lengths} in a cache of {longest} tokens")
    call = AttentionCall(
        query=query,
        key=key,
        value=value,
        layout=input_layout,
        num_heads=num_heads,
        num_key_value_heads=num_key_value_heads or num_heads,
        scale=scale,
        mask=_unsqueezed(atten_mask, one_token),
        sparse_mode=sparse_mode,
        pre_tokens=pre_tokens,
        next_tokens=next_tokens,
        zero_hidden_rows=inner_precise in (2, 3),
        query_ends=actual_seq_lengths if packed else None,
        key_ends=actual_seq_lengths_kv if packed else None,
        key_lengths=lengths,
    )
    call.check()
    width = _head_width(query, input_layout, num_heads)
    _require(width <= 512, f"head width {width} is more than 512")
    multiple = 8 if one_token else 16
    _require(width % multiple == 0, f"heads of {width} are no multiple of {multiple}")
    ratio = num_heads // call.num_key_value_heads
    _require(ratio <= 64, f"{ratio} query heads to a key and value head are more than 64")
    return call


def _per_sequence(lengths: Sequence[int], sequences: int) -> list[int]:
    """One length for all, or one for each sequence."""
    if len(lengths) == 1:
        return list(lengths) * sequences
    _require(len(lengths) >= sequences, f"{len(lengths)} lengths for {sequences} sequences")
    return list(lengths)[:sequences]


def _unsqueezed(mask: Tensor | None, one_token: bool) -> Tensor | None:
    """The mask, which may be [B, keys] for one token."""
    return mask[:, None, None] if mask is not None and one_token and mask.dim() == 2 else mask


# --- norm, rotary, SwiGLU -------------------------------------------------------------------------


@reference("npu_rms_norm")
def _(_outputs, *, input, gamma, epsilon):
    _check_gamma(input, gamma)
    x = input.float()
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    return x * rstd * gamma.float(), rstd


@reference("npu_rms_norm_backward")
def _(_outputs, *, dy, input, gamma, rstd):
    _check_gamma(input, gamma)
    normed, d_normed = input.float() * rstd, dy.float() * gamma.float()
    d_input = rstd * (d_normed - normed * (d_normed * normed).mean(-1, keepdim=True))
    return d_input, (dy.float() * normed).flatten(0, -2).sum(0)


def _check_gamma(x: Tensor, gamma: Tensor) -> None:
    _require(gamma.shape == x.shape[-1:], f"gamma {tuple(gamma.shape)} for x {tuple(x.shape)}")
    _require(x.dtype != torch.float64, "float64 is not supported")
    dtypes = {x.dtype} if x.dtype == torch.float32 else {x.dtype, torch.float32}
    _require(gamma.dtype in dtypes, f"gamma is {gamma.dtype} and x {x.dtype}")


def _rotate(x: Tensor, mode: str) -> Tensor:
    if mode == "half":
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def _rotate_back(x: Tensor, mode: str) -> Tensor:
    """The transpose of the rotation by a quarter, which is three more of it."""
    return -_rotate(x, mode)


def _check_rotary(x: Tensor, cos: Tensor, sin: Tensor, mode: str) -> None:
    _require(x.dim() == 4, f"rotary takes 4 dimensions, not {x.dim()}")
    _require(mode in ("half", "interleave"), f"rotary_mode={mode!r}")
    _require(x.dtype == cos.dtype == sin.dtype, "input, cos, sin differ in dtype")
    _require(x.dtype != torch.float64, "float64 is not supported")
    _require(x.shape[-1] % 2 == 0 and x.shape[-1] < 896, f"heads of {x.shape[-1]}")
    # The layout is not an argument: whichever the broadcast axes say, two of the three are limited.
    _require(sum(size >= 1000 for size in x.shape[:3]) <= 1, f"batch or heads of {tuple(x.shape)}")
    fits = all(size in (1, full) for size, full in zip(cos.shape, x.shape, strict=True))
    _require(
        fits and cos.shape == sin.shape and cos.shape[-1] == x.shape[-1],
        f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} for input {tuple(x.shape)}",
    )


@reference("npu_rotary_mul")
def _(_outputs, *, input, r1, r2, rotary_mode, rotate):
    if rotate is not None:
        raise NotImplementedError("rotate is not simulated")
    _check_rotary(input, r1, r2, rotary_mode)
    x = input.float()
    return x * r1.float() + _rotate(x, rotary_mode) * r2.float()


@reference("npu_rotary_mul_backward")
def _(_outputs, *, grad, input, r1, r2, rotary_mode):
    _check_rotary(input, r1, r2, rotary_mode)
    d, x = grad.float(), input.float()
    d_input = d * r1.float() + _rotate_back(d * r2.float(), rotary_mode)
    d_sin = (d * _rotate(x, rotary_mode)).sum_to_size(r2.shape)
    return d_input, (d * x).sum_to_size(r1.shape), d_sin


@reference("npu_swiglu")
def _(_outputs, *, input, dim):
    _require(input.shape[dim] % 2 == 0, f"dimension {dim} of {tuple(input.shape)} is odd")
    _require(input.is_contiguous(), "input must be contiguous")
    _require(input.dtype != torch.float64, "float64 is not supported")
    gate, up = input.float().chunk(2, dim)
    return silu(gate) * up


@reference("npu_swiglu_backward")
def _(_outputs, *, grad_output, input, dim):
    gate, up = input.float().chunk(2, dim)
    d, sigmoid = grad_output.float(), gate.sigmoid()
    d_gate = d * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat((d_gate, d * silu(gate)), dim)


# --- helpers of torch_npu's own autograd formulas and casts ---------------------------------------


@reference("_npu_dtype_cast", "npu_dtype_cast")
def _(_outputs, *, input, **_):
    return input


@reference("_npu_dtype_cast_backward", "npu_dtype_cast_backward")
def _(_outputs, *, grad, **_):
    return grad


@reference("npu_gather_backward")
def _(_outputs, *, grad, self_size, dim, index, sparse_grad):
    return grad.new_zeros(self_size).scatter_add(dim, index, grad)


@reference("repeat_interleave_backward_int")
def _(_outputs, *, grad, input, repeats, dim=None, **_):
    if dim is None:
        return grad.reshape(-1, repeats).sum(-1).reshape(input.shape)
    return grad.unflatten(dim, (input.shape[dim], repeats)).sum(dim % input.dim() + 1)


def _linear_backward(x: Tensor, grad: Tensor, weight: Tensor, wanted: Sequence[bool]):
    rows, inputs = grad.flatten(0, -2), x.flatten(0, -2)
    return (
        grad @ weight if wanted[0] else None,
        rows.T @ inputs if wanted[1] else None,
        rows.sum(0) if wanted[2] else None,
    )


def _matmul_backward(grad: Tensor, x: Tensor, other: Tensor, wanted: Sequence[bool]):
    # A vector is a matrix of one row (left) or one column (right) whose dimension is dropped.
    left = x.unsqueeze(0) if x.dim() == 1 else x
    right = other.unsqueeze(1) if other.dim() == 1 else other
    if other.dim() == 1:
        grad = grad.unsqueeze(-1)
    if x.dim() == 1:
        grad = grad.unsqueeze(-2)
    d_left = (grad @ right.transpose(-1, -2)).sum_to_size(left.shape).view_as(x)
    d_right = (left.transpose(-1, -2) @ grad).sum_to_size(right.shape).view_as(other)
    return d_left if wanted[0] else None, d_right if wanted[1] else None


def _added_up_in_fp32(operator: Callable[..., Any]) -> Callable[..., Any]:
    """A product as the matrix unit makes it: of 16-bit matrices in fp32, rounded once.

    torch's CPU kernels round once too. But where the CPU has no AVX-512 they multiply 16-bit
    matrices at a hundredth of fp32's speed.
    """

    def multiply(*factors: Any, out: Tensor | None = None, **scales: Any) -> Any:
        dtype = factors[0].dtype
        if dtype in (torch.float16, torch.bfloat16):
            factors = tree_map_only(Tensor, Tensor.float, factors)
        result = tree_map_only(Tensor, lambda x: x.to(dtype), operator(*factors, **scales))
        return result if out is None else out.copy_(result)

    return multiply


ATEN_REFERENCES |= {
    name: _added_up_in_fp32(getattr(torch, name)) for name in ("addmm", "baddbmm", "bmm", "matmul")
}
ATEN_REFERENCES["mm"] = mm = _added_up_in_fp32(torch.mm)
ATEN_REFERENCES["linear"] = _added_up_in_fp32(torch.nn.functional.linear)
ATEN_REFERENCES["linear_backward"] = _added_up_in_fp32(_linear_backward)
ATEN_REFERENCES["matmul_backward"] = _added_up_in_fp32(_matmul_backward)
