"""Names of HCCL's communicators, by which torch_npu's fused operators know a process group."""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup


def hccl_name(group: ProcessGroup) -> str:
    """The name of `group`'s communicator on this rank's NPU.

    All ranks of the group call it together at first, since that makes the communicator.
    """
    backend = group._get_backend(torch.device("npu"))
    # The backend finds this rank's device by its rank among all, not by that in the group.
    return backend.get_hccl_comm_name(torch.distributed.get_rank())  # pyright: ignore
