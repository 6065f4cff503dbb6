"""KVCache: the keys and values of a chunk's layers, and where one forward's tokens go in it.

Shapes in Megatron's letters: `s` sequence, `b` batch, `ng` query groups of this rank, `hn` head
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


class KVCache:
    """Keys and values of all layers of a chunk, in rows: a row holds one sequence.

    Args:
        num_layers: layers of the chunk.
        num_rows: sequences at once.
        num_groups: query groups of this rank.
        width: the width of a head.
        dtype: the model's.
        device: the model's.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_rows: int,
        num_groups: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (2, num_layers, num_rows, num_groups, 0, width)
        self._store = torch.empty(shape, dtype=dtype, device=device)
        self.num_rows = num_rows

    @property
    def capacity(self) -> int:
        """Tokens that a row has room for."""
        return self._store.shape[4]

    def reserve(self, capacity: int) -> None:
        """Gives every row room for at least `capacity` tokens; what it holds stays."""
        if capacity <= self.capacity:
            return
        old = self._store
        shape = (*old.shape[:4], capacity, old.shape[5])
        # Zeros, not whatever is there: attention gives places beyond a sequence's end the weight 0,
        # and 0 times NaN is NaN.
        self._store = torch.zeros(shape, dtype=old.dtype, device=old.device)
        self._store[:, :, :, :, : old.shape[4]] = old

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` tokens of one row to another, in every layer."""
        self._store[:, :, target, :, :length] = self._store[:, :, source, :, :length]

    def layers(self, tokens: NewTokens) -> list[LayerCache]:
        """What the layers need for one forward over `tokens`."""
        assert max(tokens.lengths) <= self.capacity, (tokens.lengths, self.capacity)
        rows = slice(tokens.rows[0], tokens.rows[-1] + 1)
        keys, values = self._store[:, :, rows].unbind()
        place = tokens.place(self._store.device)
        return [LayerCache(k, v, tokens, place) for k, v in zip(keys, values, strict=True)]


class NewTokens:
    """The tokens of one forward: in which rows, and after how many that are there already.

    Fresh sequences lie one after the other, `[s, 1]`; of several that go on each brings one token,
    `[1, b]`; one alone may go on with any number of tokens, `[s, 1]`.

    Args:
        rows: rows of the cache, one after the other.
        starts: tokens each of them holds already.
        counts: new tokens of each.
    """

    def __init__(self, rows: range, starts: Sequence[int], counts: Sequence[int]) -> None:
        self.rows, self.starts, self.counts = rows, tuple(starts), tuple(counts)
        self.lengths = [start + count for start, count in zip(starts, counts, strict=True)]
        self.is_fresh = not any(starts)
        assert self.is_fresh or len(rows) == 1 or set(counts) == {1}, (starts, counts)
        assert len(rows) == len(self.lengths) and min(counts) > 0, (rows, counts)

    @property
    def ends(self) -> tuple[int, ...] | None:
        """The ends of fresh sequences; None for one alone."""
        return tuple(accumulate(self.counts)) if len(self.rows) > 1 else None

    @property
    def shape(self) -> tuple[int, int]:
        """(s, b) of the forward."""
        return (
            (sum(self.counts), 1) if self.is_fresh or len(self.rows) == 1 else (1, len(self.rows))
        )

    def cos_sin(self, table: Tensor) -> Tensor:
        """Each token's rotation, `[2, s, hn]` or `[2, s, b, hn]`, from `[2, length, hn]`."""
        if len(self.rows) == 1:
            return table[:, self.starts[0] : self.lengths[0]]
        if self.is_fresh:
            return torch.cat([table[:, :count] for count in self.counts], dim=1)
        return table[:, torch.tensor([self.starts], device=table.device)]

    def last_positions(self, device: torch.device) -> Tensor | None:
        """Where each sequence's newest token is on the `s` axis; None where all are wanted."""
        if self.shape[0] == 1:
            return None
        return torch.tensor(list(accumulate(self.counts)), device=device) - 1

    def place(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """The rows and the places of tokens `[1, b]` at different places, as indices."""
        if self.is_fresh or len(set(self.starts)) == 1:
            return None
        places = torch.tensor(self.starts, device=device)
        return torch.arange(len(self.rows), device=device), places


class LayerCache:
    """One layer's keys and values, `[b, ng, capacity, hn]`, for one forward."""

    def __init__(
        self, keys: Tensor, values: Tensor, tokens: NewTokens, place: tuple[Tensor, Tensor] | None
    ) -> None:
        self.keys, self.values = keys, values
        self.lengths = tokens.lengths
        self.is_fresh = tokens.is_fresh
        self.ends = tokens.ends
        self._tokens = tokens
        self._place = place

    def write(self, k: Tensor, v: Tensor) -> None:
        """Puts the newest tokens' keys and values, `[s, b, ng, hn]`, in their places."""
        for cache, new in ((self.keys, k), (self.values, v)):
            if self._place is not None:
                rows, places = self._place
                cache[rows, :, places] = new[0]
            elif self.is_fresh:
                for row, part in enumerate(new.squeeze(1).split(self._tokens.counts)):
                    cache[row, :, : len(part)] = part.transpose(0, 1)
            else:
                # one row with any number of tokens, or several rows with one token each
                start = self._tokens.starts[0]
                cache[:, :, start : start + len(new)] = new.permute(1, 2, 0, 3)
