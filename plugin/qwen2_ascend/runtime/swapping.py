"""Tensors that wait in the host's memory until they are needed, on a stream of their own.

The stream copies a tensor out once what makes it has run, and the allocator gives its memory away
only when that is done. It copies it back into new memory, and whoever asks for it waits for that
copy on the stream that asks. On a CPU both memories are one, and the copies are plain.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

Kind = tuple[torch.Size, tuple[int, ...], torch.dtype]


class Swapped:
    """A tensor on the host, and its copy on the device from when it is fetched."""

    def __init__(self, host: Tensor, device: torch.device) -> None:
        self.host, self.device = host, device
        self.back: Tensor | None = None
        self.is_back: Any = None
        """An event, where there are streams."""


class HostSwap:
    """Moves tensors of one device to the host and back."""

    def __init__(self, device: torch.device) -> None:
        """Nothing is moved yet; host memory is taken when it is, pinned, and used again."""
        self._streams: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._stream: Any = None if self._streams is None else self._streams.Stream(device)
        self._free: dict[Kind, list[Tensor]] = defaultdict(list)

    def out(self, tensor: Tensor) -> Swapped:
        """Begins to copy a tensor out; its memory may go when nobody else holds it."""
        host = self._host_memory(tensor)
        with self._copying(tensor.device):
            host.copy_(tensor.detach(), non_blocking=True)
        if self._stream is not None:
            tensor.record_stream(self._stream)
        return Swapped(host, tensor.device)

    def fetch(self, swapped: Swapped) -> None:
        """Begins to copy it back, if nobody has; nothing waits."""
        if swapped.back is not None:
            return
        with self._copying(swapped.device, waits=False):
            swapped.back = swapped.host.to(swapped.device, non_blocking=True, copy=True)
            if self._stream is not None:
                swapped.is_back = self._stream.record_event()
        # the next copy out into this memory comes behind this one on the same stream
        self._free[_kind(swapped.host)].append(swapped.host)

    def take(self, swapped: Swapped) -> Tensor:
        """The tensor on the device; the current stream waits until it is there."""
        self.fetch(swapped)
        assert swapped.back is not None
        if swapped.is_back is not None:
            current = self._streams.current_stream(swapped.device)
            current.wait_event(swapped.is_back)
            swapped.back.record_stream(current)
        return swapped.back

    def _host_memory(self, tensor: Tensor) -> Tensor:
        """Memory of its shape, and of its strides where it has no gaps."""
        like = torch.empty_like(tensor, device="meta")
        if free := self._free[_kind(like)]:
            return free.pop()
        return torch.empty_strided(
            like.shape, like.stride(), dtype=like.dtype, pin_memory=self._stream is not None
        )

    def _copying(self, device: torch.device, *, waits: bool = True) -> AbstractContextManager[Any]:
        """Where copies go to the stream; `waits` for what the current one was given so far."""
        if self._stream is None:
            return nullcontext()
        if waits:
            self._stream.wait_stream(self._streams.current_stream(device))
        return self._streams.stream(self._stream)


def _kind(tensor: Tensor) -> Kind:
    return tensor.shape, tensor.stride(), tensor.dtype
