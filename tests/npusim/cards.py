"""One rank among several simulated cards."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=60)


@dataclass(frozen=True)
class Ranks:
    """Where this process stands, and groups of all ranks: of hccl, and of gloo to compare with."""

    rank: int
    size: int
    hccl: dist.ProcessGroup
    gloo: dist.ProcessGroup

    @property
    def next(self) -> int:
        return (self.rank + 1) % self.size

    @property
    def previous(self) -> int:
        return (self.rank - 1) % self.size


def join() -> Ranks:
    """Starts the default group (hccl) and a gloo group."""
    rank, size = int(os.environ["NPUSIM_RANK"]), int(os.environ["NPUSIM_CARDS"])
    torch.npu.set_device(rank)
    store = dist.FileStore(os.environ["NPUSIM_RENDEZVOUS"], size)
    dist.init_process_group("hccl", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    assert dist.group.WORLD is not None
    gloo = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return Ranks(rank, size, dist.group.WORLD, gloo)
