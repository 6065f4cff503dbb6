"""Random tokens in the shape of pretraining data, for trying a set-up and measuring its speed."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MockDataset:
    """Samples that depend on nothing but the seed and their number."""

    num_samples: int
    seq_length: int
    vocab_size: int
    """Tokens are below it."""
    seed: int

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.num_samples:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        text = torch.randint(self.vocab_size, (self.seq_length + 1,), generator=generator)
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": torch.ones(self.seq_length),
            "position_ids": torch.arange(self.seq_length),
        }
