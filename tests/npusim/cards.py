"""One rank among several simulated cards."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=60)
_joins = count()
"""Each start has its own keys in the store that outlasts it."""


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
    torch.npu.set_device(int(os.environ["LOCAL_RANK"]))
    server = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.PrefixStore(f"join {next(_joins)}", dist.TCPStore(*server, timeout=TIMEOUT))
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("hccl", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    assert dist.group.WORLD is not None
    gloo = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD, gloo)


@dataclass(frozen=True)
class Call:
    """One call to HCCL, as this rank made it."""

    op: str
    """The operation, such as AllReduce; sends and receives are Send and Receive."""
    communicator: str
    num_ranks: int
    count: int
    """Elements that HCCL is told of: of a gather or scatter those of one rank."""
    dtype: str
    peer: int | None

    @property
    def num_bytes(self) -> int:
        return self.count * BYTES[self.dtype]


DTYPES = ("int8", "int16", "int32", "fp16", "fp32", "int64", "uint64", "uint8", "uint16", "uint32")
DTYPES += ("fp64", "bf16")
"""The dtypes in the order of HcclDataType."""
BYTES = dict(zip(DTYPES, (1, 2, 4, 2, 4, 8, 8, 1, 2, 4, 8, 2), strict=True))


def hccl_calls() -> list[Call]:
    """Every call to HCCL that this process has made, in order."""
    path = Path(f"{os.environ['HCCL_SIM_LOG']}.{os.getpid()}")
    return [_parse(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _parse(line: str) -> Call:
    op, communicator, *numbers = line.split()
    num_ranks, _rank, count, dtype, peer = map(int, numbers)
    return Call(op, communicator, num_ranks, count, DTYPES[dtype], peer if peer >= 0 else None)
