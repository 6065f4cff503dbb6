"""Every collective that goes through torch.distributed, with the bytes of its tensor."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OPS = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "send": "send",
    "broadcast": "broadcast",
    "alltoall": "all_to_all",
}


class Call(NamedTuple):
    op: str
    num_ranks: int
    num_bytes: int
    """Bytes of the whole tensor: what is reduced, gathered, scattered or sent."""


class CollectiveLog(TorchDispatchMode):
    """Counts the calls that are made while it is entered.

    Attributes:
        calls: how often each was made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Call] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::").strip("_"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        op = next((ours for theirs, ours in OPS.items() if name.startswith(theirs)), None)
        if op is None:  # a receive is its sender's send; barriers move nothing
            assert name.startswith(("recv", "barrier", "monitored_barrier")), name
            return
        (group,) = [
            torch.distributed.ProcessGroup.unbox(arg)
            for arg in args
            if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())
        ]
        sizes = [
            sum(leaf.nbytes for leaf in tree_leaves(arg) if isinstance(leaf, torch.Tensor))
            for arg in args
        ]
        self.calls[Call(op, group.size(), max(sizes))] += 1
