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
    ops = _torch_ops() if backend == "torch" else _npu_ops()
    names = {*plain} | ({"partial_attention"} if "attention" in plain else set())
    return ops._replace(**{name: getattr(_unfused_ops(), name) for name in names})


def _npu_ops() -> Ops:
    try:
        from qwen2_ascend.ops import npu
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"backend='npu' needs torch_npu, which cannot be imported ({error}); "
            "`qwen2-ascend doctor` says what is missing, backend='torch' runs without it."
        ) from error
    return Ops(*(getattr(npu, name) for name in Ops._fields))


def _unfused_ops() -> Ops:
    from qwen2_ascend.ops.unfused import attention, partial_attention

    return _torch_ops()._replace(attention=attention, partial_attention=partial_attention)


def _torch_ops() -> Ops:
    from qwen2_ascend.ops.attention import attention, cached_attention, partial_attention
    from qwen2_ascend.ops.rms_norm import rms_norm
    from qwen2_ascend.ops.rotary import rotary
    from qwen2_ascend.ops.swiglu import swiglu

    return Ops(attention, cached_attention, partial_attention, rms_norm, rotary, swiglu)
