"""The order of samples: Megatron's, and the same after a resume at any data-parallel size."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen2_ascend.data.sampler import BATCH_KEYS, PretrainingBatchSampler, build_data_iterator
from qwen2_ascend.errors import UserError


class Numbers:
    """Sample i holds i in all its keys."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {key: torch.full((4,), i) for key in (*BATCH_KEYS, "dataset_id")}


def batches(num_samples: int, consumed: int, b: int, rank: int, size: int) -> list[list[int]]:
    sampler = PretrainingBatchSampler(
        num_samples=num_samples,
        consumed_samples=consumed,
        micro_batch_size=b,
        dp_rank=rank,
        dp_size=size,
    )
    found = list(sampler)
    assert len(found) == len(sampler)
    return found


def megatron_order(num_samples: int, consumed: int, b: int, rank: int, size: int):
    """Megatron's rule as it is described: fill a list, cut this rank's piece out of it."""
    waiting = []
    for i in range(consumed, num_samples):
        waiting.append(i)
        if len(waiting) == b * size:
            yield waiting[rank * b : (rank + 1) * b]
            waiting = []


@given(
    num_samples=st.integers(0, 200),
    consumed=st.integers(0, 220),
    b=st.integers(1, 5),
    size=st.integers(1, 6),
)
def test_order_is_megatrons(num_samples: int, consumed: int, b: int, size: int) -> None:
    for rank in range(size):
        expected = list(megatron_order(num_samples, consumed, b, rank, size))
        assert batches(num_samples, consumed, b, rank, size) == expected


@given(steps=st.integers(0, 6), layouts=st.permutations([(1, 12), (2, 3), (4, 1), (3, 4)]))
def test_a_resume_at_another_size_goes_on_exactly(steps: int, layouts) -> None:
    """Property: whatever (dp size, micro-batch) a run stops and starts with, every global batch of
    12 holds the same samples."""

    def global_batches(consumed: int, size: int, b: int) -> list[list[int]]:
        ranks = [batches(120, consumed, b, rank, size) for rank in range(size)]
        per_step = 12 // (size * b)
        steps = zip(*[iter(zip(*ranks, strict=True))] * per_step, strict=True)
        return [sorted(i for micro in step for rank in micro for i in rank) for step in steps]

    (size, b), (other_size, other_b) = layouts[:2]
    whole = global_batches(0, size, b)
    assert whole == [list(range(12 * i, 12 * i + 12)) for i in range(10)]
    assert global_batches(12 * steps, other_size, other_b) == whole[steps:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_iterator_gives_batches_of_this_rank(num_workers: int) -> None:
    iterator = build_data_iterator(Numbers(21), 1, 2, 1, 2, num_workers)
    found = list(iterator)
    assert [sorted(batch) for batch in found] == [sorted(BATCH_KEYS)] * 5
    assert [batch["tokens"][:, 0].tolist() for batch in found] == [
        [3, 4], [7, 8], [11, 12], [15, 16], [19, 20]
    ]  # fmt: skip
    assert found[0]["labels"].shape == (2, 4)


def test_iterator_leaves_the_random_state_alone() -> None:
    """A data iterator that drew from it would make a resumed run's dropout another one."""
    before = torch.get_rng_state()
    list(islice(build_data_iterator(Numbers(10), 0, 1, 0, 1), 3))
    assert torch.equal(before, torch.get_rng_state())


def test_used_up_data_is_an_error_with_a_way_out() -> None:
    with pytest.raises(UserError, match=r"10 samples are used up: 8 were consumed .* takes 4"):
        build_data_iterator(Numbers(10), 8, 2, 0, 2)
