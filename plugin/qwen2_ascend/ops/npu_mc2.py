"""torch_npu's fused operators that multiply and exchange between ranks at once (MC2).

They are the other implementation of `model/overlap.py`'s `Overlap`. The limits are those of the
operators' documents for Atlas A2 and A3 (910B and 910C): op-plugin's
`docs/zh/custom_APIs/torch_npu`, `npu_all_gather_base_mm` and `npu_mm_reduce_scatter_base`. The
third, `npu_mm_all_reduce_base`, is documented for inference, and MindSpeed does not train with it
either: without sequence parallelism there is no fused product. `training/overlap.py` refuses at
start what the operators do not take; what is checked here is for callers of `build_model`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch_npu  # pyright: ignore[reportMissingImports]  # installed where there is an NPU
from torch import Tensor
from torch.distributed import ProcessGroup

from qwen2_ascend.errors import UserError
from qwen2_ascend.ops.mc2_limits import COLUMNS, RANKS
from qwen2_ascend.runtime.communicator import hccl_name


class FusedProducts:
    """Each product and its exchange are one operator, which overlaps them by itself.

    Raises:
        UserError: the operators do not take a group of this size.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._size = group.size()
        if self._size not in RANKS:
            raise UserError(
                f"use_ascend_mc2: torch_npu's operators take 2, 4 or 8 tensor parallel ranks, not "
                f"{self._size}."
            )
        self._name = hccl_name(group)

    def gathered(self, x: Tensor, w: Tensor, *, keep: bool) -> tuple[Tensor, Tensor | None]:
        """npu_all_gather_base_mm."""
        _check(x, w)
        output, total = torch_npu.npu_all_gather_base_mm(
            x.contiguous(), w, self._name, self._size, gather_index=0, gather_output=keep
        )
        return output, total if keep else None

    def scattered(self, x: Tensor, w: Tensor) -> Callable[[], Tensor]:
        """npu_mm_reduce_scatter_base; there is nothing to wait for."""
        _check(x, w)
        output = torch_npu.npu_mm_reduce_scatter_base(
            x.contiguous(), w, self._name, self._size, reduce_op="sum"
        )
        return lambda: output

    def summed(self, x: Tensor, w: Tensor) -> Callable[[], Tensor]:
        """Raises UserError: there is no operator for it."""
        raise UserError("use_ascend_mc2 needs sequence_parallel=True.")


def _check(x: Tensor, w: Tensor) -> None:
    """Raises UserError for what the operators do not take."""
    if x.dtype not in (torch.float16, torch.bfloat16) or w.dtype != x.dtype:
        raise UserError(
            f"use_ascend_mc2: torch_npu's operators multiply bf16 or fp16, not {x.dtype} with "
            f"{w.dtype}."
        )
    if len(w) not in COLUMNS:
        raise UserError(
            f"use_ascend_mc2: torch_npu's operators take from {COLUMNS.start} to "
            f"{COLUMNS.stop - 1} columns of one rank's input, not {len(w)}."
        )
