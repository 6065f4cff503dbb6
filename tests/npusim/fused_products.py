"""What torch_npu's fused products and exchanges mean: op-plugin's documents turned into code.

The exchange is a real one, over the simulated HCCL, in the operator's dtype, among the ranks of the
communicator that is named. Of the documents' limits those of Atlas A2 and A3 are checked.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from npusim.references import _require, mm, reference

COLUMNS = range(256, 65535)
DTYPES = (torch.float16, torch.bfloat16)


@reference("npu_all_gather_base_mm")
def _(outputs, *, input, x2, hcom, world_size, gather_index, gather_output, **others):
    _require(gather_index == 0, f"gather_index={gather_index}: only x1 can be gathered")
    _check(input, x2, hcom, world_size, others)
    _require(x2.shape[0] in COLUMNS, f"{x2.shape[0]} columns are not in [256, 65535)")
    _require((outputs[1].numel() > 0) == gather_output, "gather_output and what is allocated")
    total = _exchanged("all_gather_into_tensor", input, hcom, world_size)
    return mm(total, x2), total if gather_output else None


@reference("npu_mm_reduce_scatter_base")
def _(_outputs, *, input, x2, hcom, world_size, reduce_op, **others):
    _check(input, x2, hcom, world_size, others, reduce_op)
    _require(x2.shape[0] in COLUMNS, f"{x2.shape[0]} columns are not in [256, 65535)")
    rows = input.shape[0]
    _require(rows % world_size == 0, f"{rows} rows cannot be shared by {world_size} ranks")
    return _exchanged("reduce_scatter_tensor", mm(input, x2), hcom, 1 / world_size)


def _check(
    x1: Tensor, x2: Tensor, hcom: str, ranks: int, others: dict[str, Any], reduce_op: str = "sum"
) -> None:
    allowed = (2, 4, 8)
    _require(ranks in allowed and _group(hcom).size() == ranks, f"world_size={ranks}")
    _require(reduce_op == "sum", f"reduce_op={reduce_op!r}")
    _require(x1.dtype == x2.dtype and x1.dtype in DTYPES, f"{x1.dtype} times {x2.dtype}")
    _require(x1.dim() == x2.dim() == 2 and x1.shape[1] == x2.shape[0], "shapes")
    _require(x1.is_contiguous(), "x1 must not be transposed")
    _require(x2.is_contiguous() or x2.t().is_contiguous(), "x2 may be transposed, not cut")
    given = [name for name, value in others.items() if value]
    _require(not given, f"{given} are not for training in 16 bits")


def _group(hcom: str) -> dist.ProcessGroup:
    """The process group whose communicator has this name."""
    from torch.distributed.distributed_c10d import _world

    for group, (backend, _) in _world.pg_map.items():
        if "hccl" in backend:
            own: Any = group._get_backend(torch.device("npu"))
            if own.get_hccl_comm_name(dist.get_rank(), init_comm=False) == hcom:
                return group
    raise AssertionError(f"no communicator of this process is called {hcom!r}")


def _exchanged(collective: str, x: Tensor, hcom: str, factor: float) -> Tensor:
    """The result of a collective of `factor` times as many rows, as a host view."""
    from npusim.simulator import _drain, _to_npu, host_view

    source = _to_npu(x.contiguous(), torch.device("npu", torch.npu.current_device()))
    result = torch.empty(int(len(x) * factor), x.shape[1], dtype=x.dtype, device=source.device)
    getattr(dist, collective)(result, source, group=_group(hcom))
    _drain()
    return host_view(result).clone()
