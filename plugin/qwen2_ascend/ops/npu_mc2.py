"""torch_npu's fused operators that multiply and exchange between ranks at once (MC2).

They are the other implementation of `model/overlap.py`'s `Overlap`. The limits are those of the
operators' documents for Atlas A2 and A3 (910B and 910C): op-plugin's
`docs/zh/custom_APIs/torch_npu`, `npu_all_gather_base_mm`, `npu_mm_reduce_scatter_base` and
`npu_mm_all_reduce_base`. `training/overlap.py` refuses at start what they do not take; what is
checked here is for callers of `build_model`.
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
        _check(x, w, COLUMNS)
        output, total = torch_npu.npu_all_gather_base_mm(
            x.contiguous(), w, self._name, self._size, gather_index=0, gather_output=keep
        )
        return output, total if keep else None

    def scattered(self, x: Tensor, w: Tensor) -> Callable[[], Tensor]:
        """npu_mm_reduce_scatter_base; there is nothing to wait for."""
        _check(x, w, COLUMNS)
        output = torch_npu.npu_mm_reduce_scatter_base(
            x.contiguous(), w, self._name, self._size, reduce_op="sum"
        )
        return lambda: output

    def summed(self, x: Tensor, w: Tensor) -> Callable[[], Tensor]:
        """npu_mm_all_reduce_base; there is nothing to wait for."""
        _check(x, w, None)
        output = torch_npu.npu_mm_all_reduce_base(x.contiguous(), w, self._name, reduce_op="sum")
        return lambda: output


def _check(x: Tensor, w: Tensor, columns: range | None) -> None:
    """Raises UserError for what the operators do not take."""
    if x.dtype not in (torch.float16, torch.bfloat16) or w.dtype != x.dtype:
        raise UserError(
            f"use_ascend_mc2: torch_npu's operators multiply bf16 or fp16, not {x.dtype} with "
            f"{w.dtype}."
        )
    if columns is not None and len(w) not in columns:
        raise UserError(
            f"use_ascend_mc2: torch_npu's operators take from {columns.start} to "
            f"{columns.stop - 1} columns of one rank's input, not {len(w)}."
        )
