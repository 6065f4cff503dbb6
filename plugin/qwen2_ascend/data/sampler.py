"""Which samples a data-parallel rank reads, as a pure function of how many were consumed.

The order is Megatron's (`MegatronPretrainingSampler`): samples go out in the order of the dataset,
which is shuffled already, `micro_batch_size` at a time to each data-parallel rank in turn. Nothing
is remembered between batches, so a run continues exactly where it stopped at any data-parallel
size that divides its global batch, as long as the dataset's order is what it was: that of several
epochs depends on how many samples the run is to take (`pretraining.is_repeated`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from qwen2_ascend.errors import UserError
from qwen2_ascend.vocabulary import unknown_tokens

BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids")
"""What a batch holds, each `[b, s]`: int64 tokens, labels and position_ids, float32 loss_mask."""


@dataclass(frozen=True, kw_only=True)
class PretrainingBatchSampler:
    """Yields one rank's micro-batches, each a list of `micro_batch_size` sample numbers.

    Whole micro-batches only: what does not fill one on every rank is dropped at the end.
    """

    num_samples: int
    """Samples in the dataset."""
    consumed_samples: int
    """Samples that all ranks together have read before."""
    micro_batch_size: int
    """Samples in one rank's micro-batch."""
    dp_rank: int
    dp_size: int

    def __post_init__(self) -> None:
        assert 0 <= self.dp_rank < self.dp_size
        assert self.micro_batch_size > 0
        assert self.consumed_samples >= 0

    def __len__(self) -> int:
        left = max(0, self.num_samples - self.consumed_samples)
        return left // (self.micro_batch_size * self.dp_size)

    def __iter__(self) -> Iterator[list[int]]:
        b = self.micro_batch_size
        first = self.consumed_samples + self.dp_rank * b
        for step in range(len(self)):
            start = first + step * b * self.dp_size
            yield list(range(start, start + b))


def build_data_iterator(
    dataset: Sized,
    consumed_samples: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    num_workers: int = 0,
) -> Iterator[dict[str, Tensor]]:
    """One rank's micro-batches of `dataset`, from `consumed_samples` on.

    Args:
        dataset: gives dicts that hold at least BATCH_KEYS, each `[s]`; or has its own way to make
            a batch of what it gives, as a method `collate`. Where it has a `vocab_size`, no batch
            is given with a token that is not below it.
        consumed_samples: samples that all data-parallel ranks together have read before.
        micro_batch_size: samples in one rank's micro-batch.
        dp_rank: this rank's place in the data-parallel group.
        dp_size: size of that group.
        num_workers: processes that read ahead; 0 reads in this one.

    Returns:
        An iterator over dicts of BATCH_KEYS, each `[b, s]`, or what the dataset's `collate` makes,
        that ends with the dataset. It does not draw from torch's global random generator.

    Raises:
        UserError: the dataset has not one micro-batch per rank left; later, a batch holds a token
            that the model does not have.
    """
    batches = PretrainingBatchSampler(
        num_samples=len(dataset),
        consumed_samples=consumed_samples,
        micro_batch_size=micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )
    if not len(batches):
        raise UserError(
            f"the dataset's {len(dataset)} samples are used up: {consumed_samples} were consumed "
            f"and the next step takes {micro_batch_size * dp_size}; ask for more samples when the "
            "dataset is built (--train-iters or --train-samples), or give more data."
        )
    loader: Any = DataLoader(
        dataset,  # pyright: ignore[reportArgumentType]
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=getattr(dataset, "collate", collate),
        generator=torch.Generator(),  # a loader draws its workers' seed, even without workers
    )
    return _known_tokens(loader, getattr(dataset, "vocab_size", None))


def _known_tokens(
    batches: Iterable[dict[str, Tensor]], vocab_size: int | None
) -> Iterator[dict[str, Tensor]]:
    """The batches, each after a look at its tokens: on the host, where that costs microseconds."""
    for batch in batches:
        if vocab_size is not None:
            for key in ("tokens", "labels"):
                smallest, largest = batch[key].aminmax()
                if unknown := unknown_tokens([int(smallest), int(largest)], vocab_size):
                    raise UserError(f"a batch of the data {unknown}")
        yield batch


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stacks samples of `[s]` into a batch of `[b, s]`; only BATCH_KEYS are kept."""
    return {key: torch.stack([sample[key] for sample in samples]) for key in BATCH_KEYS}
