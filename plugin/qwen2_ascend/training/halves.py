"""--reuse-fp32-param: fp32 weights kept as the bf16 weights and what rounding took from them.

A bf16 weight is the upper half of its fp32 one, rounded to the nearest. So the difference of the
two, as integers, has 16 bits: from -32768 to 32768, and the one number that is too many is that of
a tie which was rounded down, of which the places are noted (one in 131,072 by chance). The fp32
weights exist during the update only; before and after it they take 2 bytes each instead of 4, to
the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

_UPPER, _TIE = 1 << 16, 1 << 15


class Pair(NamedTuple):
    """An fp32 tensor of the optimizer's, and the bf16 weights that it was made of."""

    main: torch.Tensor
    weights: torch.Tensor
    """A view of the model's, with as many elements."""


class Halves(NamedTuple):
    """What makes a tensor of fp32 out of one of bf16."""

    lower: torch.Tensor
    """int16: the difference."""
    ties: torch.Tensor
    """int64: where the difference is 32768."""


def split(main: torch.Tensor, weights: torch.Tensor) -> Halves:
    """What `joined` needs besides the weights.

    Args:
        main: fp32.
        weights: what it is in bf16, of as many elements.
    """
    difference = main.reshape(-1).view(torch.int32) - _as_upper(weights)
    ties = (difference == _TIE).nonzero().reshape(-1)
    return Halves(difference.to(torch.int16), ties)


def joined(weights: torch.Tensor, halves: Halves) -> torch.Tensor:
    """The fp32 tensor that was split, flat."""
    whole = _as_upper(weights) + halves.lower
    # of a tie that was rounded down, int16 holds -32768 for 32768
    whole[halves.ties] += _UPPER
    return whole.view(torch.float32)


def _as_upper(weights: torch.Tensor) -> torch.Tensor:
    """bf16 weights in fp32, as int32, flat."""
    return weights.detach().reshape(-1).float().view(torch.int32)


class SplitMains:
    """The fp32 weights of an optimizer, which are there between `join` and `split` only."""

    def __init__(self, pairs: Iterable[Pair]) -> None:
        """They are there as yet."""
        self._pairs = {id(pair.main): pair for pair in pairs}
        self._halves: dict[int, Halves] = {}

    @torch.no_grad()
    def split(self) -> None:
        """Gives the memory of the fp32 weights back, of those that are what the bf16 ones say.

        All are after an update; after weights of another kind were loaded some may not be.
        """
        for key, (main, weights) in self._pairs.items():
            is_whole = key not in self._halves
            if is_whole and torch.equal(main.reshape(-1).to(weights.dtype), weights.reshape(-1)):
                self._halves[key] = split(main, weights)
                if not main.untyped_storage().resizable():  # numpy has seen it
                    main.data = torch.empty_like(main)
                main.untyped_storage().resize_(0)

    @torch.no_grad()
    def join(self) -> None:
        """Makes the fp32 weights anew, in their places."""
        for key, halves in self._halves.items():
            main, weights = self._pairs[key]
            main.untyped_storage().resize_(main.numel() * main.element_size())
            main.reshape(-1).copy_(joined(weights, halves))
        self._halves.clear()

    @torch.no_grad()
    def whole(self, main: torch.Tensor) -> torch.Tensor:
        """The fp32 weights of one tensor: itself while it is there, else a copy."""
        halves = self._halves.get(id(main))
        if halves is None:
            return main.detach()
        return joined(self._pairs[id(main)].weights, halves).view(main.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes that are kept instead of the fp32 weights."""
        tensors = [tensor for halves in self._halves.values() for tensor in halves]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def split_mains(optimizer: Any) -> SplitMains | None:
    """The split weights of an optimizer that was built to split them."""
    return getattr(optimizer, "split_mains", None)
