"""Runs of a box's elements as boxes, and how replicas share what they write."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_ascend.checkpoint.rules import TensorSlice
from qwen2_ascend.checkpoint.slices import Run, owners, parts_of, share_of

small = st.integers(1, 5)


@given(sizes=st.tuples(small, small, small), starts=st.tuples(small, small, small), data=st.data())
@pytest.mark.parametrize("joins_blocks", [True, False])
def test_parts_are_the_run_in_order(joins_blocks, sizes, starts, data):
    total = prod(sizes)
    start = data.draw(st.integers(0, total))
    run = Run(start, data.draw(st.integers(start, total)))
    box = tuple((at, at + size) for at, size in zip(starts, sizes, strict=True))
    numbers = np.arange(total).reshape(sizes)
    found, end = [], run.start
    for part, taken in parts_of(box, run, joins_blocks=joins_blocks):
        within = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(part, box, strict=True))
        own = numbers[within].reshape(-1)
        assert taken.start == end and len(own) == taken.stop - taken.start > 0
        assert joins_blocks or part[0][1] - part[0][0] == 1
        found += own.tolist()
        end = taken.stop
    assert found == list(range(*run))
    blocks = sizes[0]
    assert len(list(parts_of(box, run, joins_blocks=joins_blocks))) <= 5 + (
        0 if joins_blocks else blocks
    )


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.integers(1, 9))
def test_replicas_share_every_element_once_and_equally(sizes, num_replicas):
    named = dict(enumerate(sizes))
    shares = [share_of(named, replica, num_replicas) for replica in range(num_replicas)]
    covered = {name: [] for name in named}
    for share in shares:
        for name, run in share.items():
            covered[name] += range(*run)
    assert covered == {name: list(range(size)) for name, size in named.items()}
    written = [sum(run.stop - run.start for run in share.values()) for share in shares]
    assert max(written) - min(written) <= 1


def test_of_equal_tensors_one_rank_writes():
    whole, left, right = (((0, 1), rows, (0, 4)) for rows in ((0, 6), (0, 3), (3, 6)))
    pieces = {
        "a": {"norm": TensorSlice("norm", whole, (6, 4)), "w": TensorSlice("w", left, (3, 4))},
        "b": {"norm": TensorSlice("norm", whole, (6, 4)), "w": TensorSlice("w", right, (3, 4))},
    }
    assert owners(pieces) == {"a": {"norm", "w"}, "b": {"w"}}
