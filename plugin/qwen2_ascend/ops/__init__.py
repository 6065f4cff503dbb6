"""The operators of a Qwen2 layer: plain torch, and a fused twin per device behind one signature.

Shapes in Megatron's letters: `s` sequence, `b` micro-batch, `np` query heads and `ng` query groups
of this rank, `hn` head width, `h` hidden, `f` ffn.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, NamedTuple

from qwen2_ascend.errors import UserError
from qwen2_ascend.ops.blocks import PartialAttention

if TYPE_CHECKING:
    from torch import Tensor


class Ops(NamedTuple):
    """One implementation of each operator; `ops/` of the same name says what it computes."""

    attention: Callable[..., Tensor]
    cached_attention: Callable[..., Tensor]
    partial_attention: PartialAttention
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rotary: Callable[[Tensor, Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor], Tensor]


def get_ops(backend: str = "torch", *, plain: Collection[str] = ()) -> Ops:
    """The operators of `backend`; "torch" is plain torch and runs on every device.

    Args:
        backend: "torch" or "npu".
        plain: names of operators that no fused kernel is to compute, to hunt a difference:
            `unfused.py`'s attention, whole and partial, and of the others the plain ones.

    Raises:
        UserError: a backend or an operator that this release does not have.
    """
    if unknown := sorted(set(plain) - set(Ops._fields)):
        raise UserError(
            f"plain={', '.join(unknown)} is not an operator; they are {', '.join(Ops._fields)}."
        )
    if backend not in ("torch", "npu"):
        raise UserError(f"backend={backend!r} is not known; use 'torch' or 'npu'.")
    from qwen2_ascend.ops import attention, rms_norm, rotary, swiglu, unfused  # with torch

    usual = Ops(
        attention.attention,
        attention.cached_attention,
        attention.partial_attention,
        rms_norm.rms_norm,
        rotary.rotary,
        swiglu.swiglu,
    )
    ops = usual if backend == "torch" else _npu_ops()
    own = usual._replace(attention=unfused.attention, partial_attention=unfused.partial_attention)
    names = {*plain} | ({"partial_attention"} if "attention" in plain else set())
    return ops._replace(**{name: getattr(own, name) for name in names})


def _npu_ops() -> Ops:
    try:
        from qwen2_ascend.ops import npu
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"backend='npu' needs torch_npu, which cannot be imported ({error}); "
            "`qwen2-ascend doctor` says what is missing, backend='torch' runs without it."
        ) from error
    return Ops(*(getattr(npu, name) for name in Ops._fields))
