"""The operators of a Qwen2 layer: plain torch, and a fused twin per device behind one signature.

Shapes in Megatron's letters: `s` sequence, `b` micro-batch, `np` query heads and `ng` query groups
of this rank, `hn` head width, `h` hidden, `f` ffn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from qwen2_ascend.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class Ops(NamedTuple):
    """One backend's operators."""

    attention: Callable[..., Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rotary: Callable[[Tensor, Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor], Tensor]


def get_ops(backend: str = "torch") -> Ops:
    """The operators of `backend`; "torch" is plain torch and runs on every device.

    Raises:
        UserError: a backend this release does not have.
    """
    if backend != "torch":
        raise UserError(f"backend={backend!r} is not known; this release has only 'torch'.")
    from qwen2_ascend.ops.attention import attention
    from qwen2_ascend.ops.rms_norm import rms_norm
    from qwen2_ascend.ops.rotary import rotary
    from qwen2_ascend.ops.swiglu import swiglu

    return Ops(attention, rms_norm, rotary, swiglu)
