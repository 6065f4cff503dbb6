"""Where the host waits for what the device has computed."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FETCHING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero")
COPYING = ("aten::_to_copy", "aten::copy_")
OURS = ("qwen2_ascend", "megatron")


@contextmanager
def counting_transfers() -> Iterator[list[str]]:
    """Lists, of the block, every fetch of a result from the device, with where it comes from."""
    transfers: list[str] = []
    with _Watch(transfers):
        yield transfers


class _Watch(TorchDispatchMode):
    def __init__(self, transfers: list[str]) -> None:
        super().__init__()
        self.transfers = transfers

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.name().split(".")[0]
        from_device = _is_on("npu", (args, kwargs))
        if from_device and (name in FETCHING or (name in COPYING and _is_on("cpu", result))):
            frames = [f for f in traceback.extract_stack() if any(x in f.filename for x in OURS)]
            places = [f"{frame.filename}:{frame.lineno}" for frame in frames[-3:]]
            self.transfers.append(f"{name} from {' > '.join(places)}")
        return result


def _is_on(device: str, tree: object) -> bool:
    leaves = tree_leaves(tree)
    return any(isinstance(x, torch.Tensor) and x.device.type == device for x in leaves)
