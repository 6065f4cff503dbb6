"""How long a run is does not depend on how often it is stopped, nor on the batches it takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_ascend.training.length import RunLength
from qwen2_ascend.training.optimizer_settings import OptimizerSettings
from qwen2_ascend.training.settings import BatchSettings, PretrainSettings

SIZES = st.integers(1, 64)


def settings(**batch: int) -> PretrainSettings:
    return PretrainSettings(
        batch=BatchSettings(seq_length=8, **batch), optimizer=OptimizerSettings(lr=1.0)
    )


@given(size=SIZES, made=st.integers(0, 100), asked=st.integers(0, 200), at=st.integers(0, 200))
def test_with_one_batch_size_a_resumed_run_is_as_long_as_a_whole_one(
    size: int, made: int, asked: int, at: int
) -> None:
    whole = RunLength(train_iters=asked, global_batch_size=size)
    resumed = RunLength(
        train_iters=asked, global_batch_size=size, iteration=made, consumed_samples=made * size
    )
    assert resumed.samples_at(at) == whole.samples_at(at) == at * size
    assert resumed.num_samples == whole.num_samples


@given(first=SIZES, then=SIZES, made=st.integers(0, 50), left=st.integers(0, 50))
def test_data_needed_is_what_was_consumed_and_what_is_left(
    first: int, then: int, made: int, left: int
) -> None:
    found = settings(train_iters=made + left, global_batch_size=then).length(
        1, iteration=made, consumed_samples=made * first
    )
    assert found.num_samples == made * first + left * then


@given(first=SIZES, then=SIZES, made=st.integers(0, 50), samples=st.integers(0, 5000))
def test_a_run_of_samples_takes_all_that_fill_a_batch(
    first: int, then: int, made: int, samples: int
) -> None:
    consumed = made * first
    found = settings(train_samples=samples, global_batch_size=then).length(
        1, iteration=made, consumed_samples=consumed
    )
    assert found.train_iters >= made
    left = samples - found.num_samples
    assert 0 <= left < then or (found.train_iters == made and consumed > samples - then)


@pytest.mark.parametrize(
    ("iteration", "expected"), [(0, 0), (10, 40), (20, 80), (21, 96), (30, 240)]
)
def test_marks_that_are_passed_lie_where_they_were(iteration: int, expected: int) -> None:
    """20 steps of 4 samples, then 16: a warm-up that has ended keeps its length."""
    length = RunLength(train_iters=30, global_batch_size=16, iteration=20, consumed_samples=80)
    assert length.samples_at(iteration) == expected
