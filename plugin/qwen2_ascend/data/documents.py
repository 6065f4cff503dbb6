"""Pretraining samples in which a document sees itself alone: --reset-attention-mask.

A sample of GPTDataset is a piece of all documents one behind the other. Here a sample says where
its documents end, and positions count from each document's start. A document ends where the data
says so, and after each end-of-document token, as in Megatron-LM and MindSpeed-LLM, which know the
token alone. So data that was prepared without --append-eod is kept apart too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from qwen2_ascend.data.chat.dataset import batch_ends
from qwen2_ascend.data.sampler import collate


class DocumentRows:
    """A dataset of GPTDataset's samples with the ends of their documents.

    A sample has also `ends`: a tuple of ints, the cumulative ends of its documents, the last of
    them `s`. The last token of a document that does not end with `eod_token` has no loss: its
    label is another document's first token, which it cannot know.
    """

    is_packed = True

    def __init__(self, data: Any, eod_token: int | None) -> None:
        """Wraps a GPTDataset, or a BlendedDataset of them.

        Args:
            data: what is wrapped; its own positions count through the sample.
            eod_token: id of the token that ends a document; None where there is none.
        """
        self.data = data
        self.vocab_size = getattr(data, "vocab_size", None)
        self._eod_token = -1 if eod_token is None else eod_token  # no token is -1

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.data[index]
        tokens = sample["tokens"].numpy()
        s = len(tokens)
        stored = stored_ends(self.data, index)
        stored = stored[(stored > 0) & (stored <= s)]  # the token after it is a label only
        marked = np.flatnonzero(tokens == self._eod_token) + 1
        ends = np.union1d(np.concatenate((stored, marked)), [s])
        starts = np.concatenate(([0], ends[:-1]))
        position_ids = np.arange(s) - np.repeat(starts, ends - starts)
        loss_mask = sample["loss_mask"].clone()
        loss_mask[torch.from_numpy(np.setdiff1d(stored, marked) - 1)] = 0
        return {
            **sample,
            "position_ids": torch.from_numpy(position_ids),
            "loss_mask": loss_mask,
            "ends": tuple(ends.tolist()),
        }

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """BATCH_KEYS `[b, s]`, and `ends` over the flattened batch, without a leading zero."""
        return {**collate(samples), "ends": batch_ends([sample["ends"] for sample in samples])}


def stored_ends(data: Any, index: int) -> np.ndarray:
    """Where documents end in a sample and the token after it; not its own end.

    `data` is a GPTDataset, or a BlendedDataset of them.
    """
    while hasattr(data, "dataset_index"):
        data, index = data.datasets[data.dataset_index[index]], data.dataset_sample_index[index]
    place = data.shuffle_index[index]
    (first, offset), (last, _) = data.sample_index[place], data.sample_index[place + 1]
    lengths = data.dataset.sequence_lengths[data.document_index[first:last]]
    return np.unique(np.cumsum(lengths, dtype=np.int64) - offset)
