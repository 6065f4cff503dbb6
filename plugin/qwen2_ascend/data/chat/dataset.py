"""Samples and batches of chats that are tokenized already.

A chat of n tokens takes n positions. Its labels are its tokens moved by one inside the chat, so
no chat predicts another's first token, and its last position has no loss. Labels are always
valid ids; `loss_mask` alone says where the loss is.

In a packed sample several chats stand one behind the other and padding is a last document of its
own. Position ids count from each document's start, and `ends` says where the documents end.
Shapes: `s` tokens of a sample, `b` samples of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from qwen2_ascend.data.chat.packing import Packing, best_fit_decreasing
from qwen2_ascend.data.chat.stored import StoredChats
from qwen2_ascend.data.sampler import BATCH_KEYS

Sample = dict[str, Any]


class ChatDataset:
    """One epoch of chats, one or several to a sample.

    A sample is a dict of torch tensors, `tokens`, `labels` and `position_ids` int64 `[s]`,
    `loss_mask` float32 `[s]`, `index` int64 `[]` (the sample's number in this dataset), and, when
    packed, `ends`: a tuple of ints, the cumulative ends of the documents, the last of them s.
    s is `seq_length`, but the chat's own length with `variable_seq_lengths`.
    """

    def __init__(
        self,
        stored: StoredChats,
        rows: np.ndarray,
        *,
        seq_length: int,
        pack: bool,
        seed: int,
        pad_token: int,
        variable_seq_lengths: bool,
        pad_to_multiple_of: int,
    ) -> None:
        """Makes samples of `rows` of `stored`; with `pack` several rows go into one.

        Args:
            stored: tokenized chats; rows that are packs already stay one sample each.
            rows: numbers of the chats to take.
            seq_length: tokens of a sample; longer chats are cut at the end.
            pack: put several chats into a sample.
            seed: the seed of the packing.
            pad_token: what fills a sample up.
            variable_seq_lengths: do not fill up here but in `collate`, to the longest of a batch.
            pad_to_multiple_of: with `variable_seq_lengths`, the batch's length is a multiple of it.
        """
        assert not (pack or stored.is_packed) or not variable_seq_lengths
        self.is_packed = pack or stored.is_packed
        self.seq_length = seq_length
        self._stored, self._rows, self._pad_token = stored, np.asarray(rows), pad_token
        self._variable = variable_seq_lengths
        self._multiple = pad_to_multiple_of if variable_seq_lengths else 1
        self._packing: Packing | None = None
        if pack and not stored.is_packed:
            lengths = np.minimum(stored.lengths[self._rows], seq_length)
            self._packing = best_fit_decreasing(lengths, seq_length, seed)

    def __len__(self) -> int:
        return len(self._rows) if self._packing is None else len(self._packing)

    def rows(self, index: int) -> np.ndarray:
        """The rows of the stored chats that sample `index` is made of."""
        return self._rows[[index] if self._packing is None else self._packing.pack(index)]

    @property
    def num_tokens(self) -> int:
        """Tokens of all chats of an epoch, padding not counted."""
        return int(np.minimum(self._stored.lengths[self._rows], self.seq_length).sum())

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        chats = [
            chat for row in self.rows(index) for chat in self._stored.chats(row, self.seq_length)
        ]
        assert self.is_packed or len(chats) == 1
        lengths = [len(ids) for ids, _ in chats]
        used = sum(lengths)
        s = used if self._variable else self.seq_length
        assert used <= s
        tokens = np.full(s, self._pad_token, dtype=np.int64)
        labels = np.full(s, self._pad_token, dtype=np.int64)
        loss_mask = np.zeros(s, dtype=np.float32)
        position_ids = np.arange(s, dtype=np.int64)
        ends = list(accumulate(lengths))
        for (ids, trained), end in zip(chats, ends, strict=True):
            start = end - len(ids)
            tokens[start:end] = ids
            labels[start : end - 1] = ids[1:]
            loss_mask[start : end - 1] = trained[1:]
            position_ids[start:end] -= start
        if self.is_packed and used < s:
            position_ids[used:] -= used
            ends.append(s)
        arrays = (tokens, labels, loss_mask, position_ids)
        sample: Sample = {k: torch.from_numpy(v) for k, v in zip(BATCH_KEYS, arrays, strict=True)}
        sample["index"] = torch.tensor(index)
        if self.is_packed:
            sample["ends"] = tuple(ends)
        return sample

    def collate(self, samples: list[Sample]) -> dict[str, Any]:
        """A micro-batch: BATCH_KEYS `[b, s]`, `index` `[b]` and, when packed, `ends`.

        Shorter rows are filled up to the longest. `ends` is a tuple of ints: cumulative ends over
        the flattened batch, row after row, without a leading zero; the last is b * s.
        """
        longest = max(len(sample["tokens"]) for sample in samples)
        s = -(-longest // self._multiple) * self._multiple
        assert not self.is_packed or all(len(sample["tokens"]) == s for sample in samples)
        fill = {"tokens": self._pad_token, "labels": self._pad_token, "loss_mask": 0}
        batch: dict[str, Any] = {
            key: torch.stack([_filled(sample[key], s, fill.get(key)) for sample in samples])
            for key in BATCH_KEYS
        }
        batch["index"] = torch.stack([sample["index"] for sample in samples])
        if self.is_packed:
            batch["ends"] = batch_ends([sample["ends"] for sample in samples])
        return batch


class PairDataset:
    """One epoch of preference pairs; a sample is a dict of two samples, `chosen` and `rejected`.

    Both are as ChatDataset's. A micro-batch of b pairs holds 2 b rows: the b chosen ones, then
    their rejected ones in the same order; `index` `[b]` numbers the pairs of this dataset, the same
    in every run and epoch, so that what a reference model said of them can be kept.
    """

    is_packed = False

    def __init__(self, chosen: ChatDataset, rejected: ChatDataset) -> None:
        assert len(chosen) == len(rejected) and not (chosen.is_packed or rejected.is_packed)
        self._sides = {"chosen": chosen, "rejected": rejected}

    def __len__(self) -> int:
        return len(self._sides["chosen"])

    @property
    def num_tokens(self) -> int:
        """Tokens of both sides of an epoch, padding not counted."""
        return sum(side.num_tokens for side in self._sides.values())

    def __getitem__(self, index: int) -> Sample:
        return {name: side[index] for name, side in self._sides.items()}

    def collate(self, samples: list[Sample]) -> dict[str, Any]:
        """BATCH_KEYS `[2 b, s]`, chosen rows first, and `index` `[b]`."""
        rows = [sample[name] for name in self._sides for sample in samples]
        batch = self._sides["chosen"].collate(rows)
        batch["index"] = batch["index"][: len(samples)]
        return batch


class EpochDataset:
    """`num_samples` samples of a dataset, epoch after epoch, each in an order of its own.

    What sample i is depends on the dataset, the seed and i alone, so a run that continues at
    consumed_samples sees what it would have seen.
    """

    def __init__(
        self,
        source: ChatDataset | PairDataset,
        *,
        num_samples: int | None,
        seed: int,
        shuffle: bool,
        vocab_size: int | None = None,
    ) -> None:
        """Repeats `source` until there are `num_samples`; None is one epoch.

        With `vocab_size` every batch is looked at for tokens that the model does not have.
        """
        self.source, self.seed, self.shuffle = source, seed, shuffle
        self.vocab_size = vocab_size
        self.num_samples = len(source) if num_samples is None else num_samples

    @property
    def samples_per_epoch(self) -> int:
        """Samples of one epoch."""
        return len(self.source)

    @property
    def is_packed(self) -> bool:
        """Whether batches hold `ends`."""
        return self.source.is_packed

    def with_num_samples(self, num_samples: int) -> EpochDataset:
        """The same data and order, of another length."""
        data = copy(self)
        data.num_samples = num_samples
        return data

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.num_samples:
            raise IndexError(index)
        epoch, place = divmod(index, len(self.source))
        if self.shuffle:
            place = int(_order(len(self.source), self.seed, epoch)[place])
        return self.source[place]

    def collate(self, samples: list[Sample]) -> dict[str, Any]:
        """The source's."""
        return self.source.collate(samples)


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def _filled(row: Any, s: int, value: int | None) -> Any:
    """`row` up to length s; positions (no `value`) count on."""
    missing = s - len(row)
    if not missing:
        return row
    if value is None:
        return torch.cat([row, torch.arange(len(row), s)])
    return torch.cat([row, row.new_full((missing,), value)])


def batch_ends(rows: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """Ends of all rows of a batch, counted over the flattened batch, without a leading zero."""
    ends: list[int] = []
    for row in rows:
        start = ends[-1] if ends else 0
        ends += [start + end for end in row]
    return tuple(ends)
