"""Bytes of all tensors that are alive, counted as operators make them and Python lets them go.

What is counted is the storage of every tensor an operator gives, from its making until nobody holds
it: parameters, gradients, the optimizer's state, what autograd keeps, and temporary results. It is
what a device's allocator would be asked for, without its rounding and without the scratch space
inside a kernel, which differs from device to device.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMemory(TorchDispatchMode):
    """Counts while it is entered; enter it before the first tensor is made.

    Attributes:
        live: bytes now.
        peak: most bytes since the last `reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(given):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return given

    def __enter__(self) -> TensorMemory:
        """Sees also what gives its memory back and takes it again while it lives."""
        super().__enter__()
        self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, num_bytes: int) -> Any:
            resized = self._resize(storage, num_bytes)
            if storage._cdata in self._sizes:
                self._forget(storage._cdata)
                self._count(storage)
            return resized

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
        return self

    def __exit__(self, *args: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*args)

    def reset_peak(self) -> None:
        """Forgets the peak so far."""
        self.peak = self.live

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._count(storage)
        weakref.finalize(storage, self._forget, key)

    def _count(self, storage: torch.UntypedStorage) -> None:
        self._sizes[storage._cdata] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
