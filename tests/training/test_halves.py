"""fp32 weights out of bf16 ones and what rounding took from them, to the last bit."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2_ascend.training.halves import Pair, SplitMains, joined, split

BITS = st.integers(-(2**31), 2**31 - 1)


def is_number(bits: int) -> bool:
    """Neither infinite nor NaN, and not rounded to it."""
    return bits & 0x7FFFFFFF < 0x7F7F8000


@settings(deadline=None)
@given(st.lists(BITS.filter(is_number), min_size=1, max_size=50))
def test_every_number_comes_back(bits: list[int]) -> None:
    main = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    weights = main.to(torch.bfloat16)
    assert torch.equal(
        joined(weights, split(main, weights)).view(torch.int32), main.view(torch.int32)
    )


def test_ties_go_to_even_and_come_back() -> None:
    """A tie is rounded up from an odd upper half and down from an even one."""
    uppers = torch.arange(0x3F00, 0x3F40, dtype=torch.int32)
    bits = (uppers << 16) + 0x8000
    main = torch.cat([bits, bits | -(2**31)]).view(torch.float32)
    weights = main.to(torch.bfloat16)
    halves = split(main, weights)
    assert len(halves.ties) == len(main) // 2
    assert torch.equal(joined(weights, halves), main)


def test_memory_is_given_back_between_updates() -> None:
    main = torch.randn(40, 25)
    main.numpy()  # which fixes the size of its memory
    main.requires_grad_()
    weights = main.detach().to(torch.bfloat16).view(-1)
    expected, mains = main.detach().clone(), SplitMains([Pair(main, weights)])
    mains.split()
    assert main.untyped_storage().nbytes() == 0 and mains.num_bytes == 2 * 1000
    assert torch.equal(mains.whole(main), expected), "a copy"
    mains.join()
    assert torch.equal(main.detach(), expected) and mains.num_bytes == 0


def test_weights_of_another_kind_are_kept_whole() -> None:
    """Loaded ones need not be what fp32 weights round to; after the next update they are."""
    main = torch.randn(10).requires_grad_()
    weights = main.detach().to(torch.bfloat16)
    weights[3] += 1
    mains = SplitMains([Pair(main, weights)])
    mains.split()
    assert main.untyped_storage().nbytes() == 40 and mains.num_bytes == 0
    weights.copy_(main.detach())
    mains.split()
    assert main.untyped_storage().nbytes() == 0
