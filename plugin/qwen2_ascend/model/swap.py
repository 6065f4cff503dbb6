"""--swap-attention: what attention keeps for backward waits in the host's memory.

Forward hands each tensor to `runtime.swapping` as autograd keeps it. Backward of a layer takes its
tensors, and begins to fetch those of the layer before it, whose turn is next.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qwen2_ascend.runtime.swapping import HostSwap, Swapped

SMALLEST_BYTES = 1024
"""What is smaller, such as a seed, stays where it is."""


class Group:
    """The tensors of one layer and micro-batch."""

    def __init__(self, swap: HostSwap, before: Group | None) -> None:
        self._swap, self._before = swap, before
        self._members: list[Swapped] = []
        self._seen: dict[tuple[Any, ...], tuple[Tensor, Swapped]] = {}
        self._is_taken = False

    def keep(self, tensor: Tensor) -> Swapped:
        """Moves a tensor out, once however often autograd keeps it before `close`.

        Until then the tensor is held: what is freed may leave its place to another one.
        """
        key = tensor.data_ptr(), tensor.shape, tensor.stride()
        if key not in self._seen:
            self._seen[key] = tensor, self._swap.out(tensor)
            self._members.append(self._seen[key][1])
        return self._seen[key][1]

    def close(self) -> None:
        """Forward of the layer is over: its tensors may go."""
        self._seen.clear()

    def fetch(self) -> None:
        """Begins to bring all of them back, unless they have been."""
        for member in () if self._is_taken else self._members:
            self._swap.fetch(member)

    def take(self, swapped: Swapped) -> Tensor:
        """One of them on the device; those of the layer before are begun to be fetched."""
        if not self._is_taken:
            self.fetch()
            self._is_taken = True
            self._members.clear()
            if self._before is not None:
                self._before.fetch()
            self._before = None  # or all layers would live as long as the last
        return self._swap.take(swapped)


class AttentionSwap:
    """Swaps what the attentions of a model chunk keep."""

    def __init__(self, device: torch.device) -> None:
        self._swap = HostSwap(device)
        self._last: Group | None = None

    @contextmanager
    def keeping_outside(self, *held: Tensor) -> Iterator[None]:
        """Where what autograd keeps goes to the host.

        Args:
            *held: tensors that others hold too, and so gain nothing.
        """
        if not torch.is_grad_enabled():
            yield
            return
        group = self._last = Group(self._swap, self._last)
        shared = {tensor.untyped_storage().data_ptr() for tensor in held}

        def pack(tensor: Tensor) -> Tensor | Swapped:
            is_small = tensor.numel() * tensor.element_size() < SMALLEST_BYTES
            stays = is_small or tensor.untyped_storage().data_ptr() in shared
            return tensor if stays else group.keep(tensor)

        def unpack(packed: Tensor | Swapped) -> Tensor:
            return group.take(packed) if isinstance(packed, Swapped) else packed

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
        group.close()


def swap_attention(layers: Iterable[Any], device: torch.device) -> None:
    """Lets the attention of each of a chunk's layers swap what it keeps."""
    swap = AttentionSwap(device)
    for layer in layers:
        layer.self_attention.swap = swap
