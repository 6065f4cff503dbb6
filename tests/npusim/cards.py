"""One rank among several simulated cards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=60)


@dataclass(frozen=True)
class Ranks:
    """Where this process stands, and a gloo group of the same ranks to compare with."""

    rank: int
    size: int
    gloo: dist.ProcessGroup

    @property
    def next(self) -> int:
        return (self.rank + 1) % self.size

    @property
    def previous(self) -> int:
        return (self.rank - 1) % self.size


@contextmanager
def start() -> Iterator[Ranks]:
    """Joins the default group (hccl) and a gloo group; leaves them at the end."""
    rank, size = int(os.environ["NPUSIM_RANK"]), int(os.environ["NPUSIM_CARDS"])
    torch.npu.set_device(rank)
    store = dist.FileStore(os.environ["NPUSIM_RENDEZVOUS"], size)
    dist.init_process_group("hccl", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    yield Ranks(rank, size, dist.new_group(backend="gloo", timeout=TIMEOUT))
    dist.destroy_process_group()
