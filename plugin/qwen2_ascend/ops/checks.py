"""What every implementation of an operator demands of its arguments.

torch_npu's host code lets most mistakes pass, and what comes out then is other numbers; plain torch
broadcasts some of them. Everything here is a few comparisons of host numbers: no check waits for
the device. ValueError is a mistake in the calling code, UserError one in what was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import lt

from torch import Tensor

from qwen2_ascend.errors import UserError


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, ends: Sequence[int] | None
) -> None:
    """Checks `attention`'s shapes, heads, dtypes, dropout range and documents.

    Raises:
        ValueError: they contradict each other.
        UserError: attention dropout out of range.
    """
    s, b, _, width = _four(q, "q")
    groups = _four(k, "k")[2]
    if not (k.shape == v.shape == (s, b, groups, width)) or q.shape[2] % groups:
        raise ValueError(
            f"attention takes q [s, b, np, hn], k and v [s, b, ng, hn] with np a multiple of ng; "
            f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}."
        )
    check_one_dtype("attention", q=q, k=k, v=v)
    if not 0 <= dropout_p < 1:
        raise UserError(f"attention_dropout={dropout_p} is not a share: 0 or more, less than 1.")
    if ends is not None:
        check_ends(ends, s, b)


def check_ends(ends: Sequence[int], s: int, b: int) -> None:
    """Raises ValueError unless the ends divide b rows of s tokens into documents."""
    if not isinstance(ends, (tuple, list)):
        raise ValueError(f"ends is a {type(ends).__name__}; pass a tuple of host numbers.")
    rising = all(map(lt, (0, *ends), ends))
    # Without the ends of the rows a document would go on in the next sequence.
    if not (rising and ends and ends[-1] == s * b and {*range(s, s * b, s)} <= {*ends}):
        shown = ", ".join(map(str, ends[:8])) + (", ..." if len(ends) > 8 else "")
        raise ValueError(
            f"ends=({shown}) do not divide {b} row(s) of {s} tokens into documents: they rise, "
            f"without the leading 0, to {s * b}, and each row's end is one of them."
        )


def check_cached_attention(q: Tensor, keys: Tensor, values: Tensor, lengths: Sequence[int]) -> None:
    """Checks `cached_attention`'s shapes, heads, dtypes and lengths within the cache.

    Raises:
        ValueError: they contradict each other.
    """
    s, b, heads, width = _four(q, "q")
    _, groups, capacity, _ = _four(keys, "keys")
    if not (keys.shape == values.shape == (b, groups, capacity, width)) or heads % groups:
        raise ValueError(
            f"cached_attention takes q [s, b, np, hn], keys and values [b, ng, capacity, hn] with "
            f"np a multiple of ng; got q {list(q.shape)}, keys {list(keys.shape)}, values "
            f"{list(values.shape)}."
        )
    check_one_dtype("cached_attention", q=q, keys=keys, values=values)
    if len(lengths) != b or not s <= min(lengths) <= max(lengths) <= capacity:
        raise ValueError(
            f"lengths={list(lengths)} is not one number for each of {b} sequence(s), from the "
            f"{s} newest token(s) to the cache's capacity of {capacity}."
        )


def check_rms_norm(x: Tensor, weight: Tensor) -> None:
    """Raises ValueError unless the weight has x's last axis and dtype."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm's weight is {list(weight.shape)} and must be [{x.shape[-1]}], x's last axis."
        )
    check_one_dtype("rms_norm", x=x, weight=weight)


def check_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raises ValueError unless cos and sin have a row for each of x's positions, and its dtype."""
    s, b, width = x.shape[0], x.shape[1], x.shape[-1]
    fits = cos.shape in ((s, width), (s, b, width)) and cos.shape == sin.shape
    if x.dim() < 4 or width % 2 or not fits:
        raise ValueError(
            f"rotary takes x [s, b, ..., hn] with hn even, cos and sin [s, hn] or [s, b, hn]; got "
            f"x {list(x.shape)}, cos {list(cos.shape)}, sin {list(sin.shape)}."
        )
    check_one_dtype("rotary", x=x, cos=cos, sin=sin)


def check_swiglu(x: Tensor) -> None:
    """Raises ValueError unless x has two halves."""
    if x.shape[-1] % 2:
        raise ValueError(f"swiglu takes gate and up, [..., 2 * f]; got x {list(x.shape)}.")


def check_one_dtype(op: str, **tensors: Tensor) -> None:
    """Raises ValueError unless all have one dtype: none is converted behind anyone's back."""
    if len({x.dtype for x in tensors.values()}) > 1:
        found = ", ".join(f"{name} {x.dtype}" for name, x in tensors.items())
        raise ValueError(f"{op} takes tensors of one dtype; got {found}.")


def _four(x: Tensor, name: str) -> tuple[int, ...]:
    if x.dim() != 4:
        raise ValueError(f"{name} has {x.dim()} axes instead of 4: {list(x.shape)}.")
    return x.shape
