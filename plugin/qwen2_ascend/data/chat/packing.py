"""Which chats share a sample of fixed length."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Packing(NamedTuple):
    """Chats put into packs."""

    order: np.ndarray
    """The chats' numbers, pack after pack."""
    starts: np.ndarray
    """Where each pack starts in `order`, and the end of the last."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def pack(self, index: int) -> np.ndarray:
        """The chats in pack `index`."""
        return self.order[self.starts[index] : self.starts[index + 1]]


def best_fit_decreasing(lengths: Sequence[int] | np.ndarray, capacity: int, seed: int) -> Packing:
    """Packs chats, longest first, each where it leaves the least space over.

    Takes at most 11/9 of the fewest packs possible (Johnson, 1973), in O(n log capacity). Chats of
    equal length are taken in an order that `seed` shuffles, so neighbours in the file do not
    always share a pack.

    Args:
        lengths: tokens of each chat, 1 to `capacity`.
        capacity: tokens of a pack.
        seed: the seed of the shuffling; the same seed gives the same packs everywhere.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if not len(lengths):
        return Packing(np.empty(0, np.int64), np.zeros(1, np.int64))
    assert lengths.min() >= 1 and lengths.max() <= capacity
    shuffled = np.random.default_rng([seed, len(lengths)]).permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    packs: list[list[int]] = []
    by_space: defaultdict[int, list[int]] = defaultdict(list)
    """The packs that have this much space left."""
    spaces: list[int] = []
    """The keys of `by_space` that hold a pack, sorted."""
    for chat, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        at = bisect.bisect_left(spaces, length)
        if at == len(spaces):
            pack, space = len(packs), capacity
            packs.append([])
        else:
            space = spaces[at]
            pack = by_space[space].pop()
            if not by_space[space]:
                spaces.pop(at)
        packs[pack].append(chat)
        space -= length
        if not by_space[space]:
            bisect.insort(spaces, space)
        by_space[space].append(pack)
    starts = np.cumsum([0, *(len(pack) for pack in packs)])
    return Packing(np.array([chat for pack in packs for chat in pack]), starts)
