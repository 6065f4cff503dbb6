"""Attention of cards that share rows: torch_npu's fused operators over HCCL, on simulated cards."""

from __future__ import annotations

from functools import partial

import pytest

from model.context_cases import (
    ALGORITHMS,
    PACKINGS,
    SCALE,
    error,
    inputs,
    output_and_gradients,
    own,
    sent_bytes,
)

CARDS = 4
pytestmark = pytest.mark.simulated(cards=CARDS)
SLACK = 3
"""Times the error of the plain operator on whole rows; seen 2.2."""


@pytest.fixture(scope="module")
def groups():
    """This card's group of each context-parallel size."""
    import torch.distributed as dist

    from npusim.cards import join

    ranks = join()
    found = {}
    for cp in (2, CARDS):
        every = [dist.new_group(range(first, first + cp)) for first in range(0, CARDS, cp)]
        found[cp] = every[ranks.rank // cp]
    yield found
    dist.destroy_process_group()


def shared(algorithm, group):
    """`context_attention` by the fused operators, and this card's part of whole rows."""
    import torch.distributed as dist

    from qwen2_ascend.model.context_parallel import context_attention
    from qwen2_ascend.ops import get_ops

    cp, rank = dist.get_world_size(group), dist.get_rank(group)
    attend = partial(context_attention, algorithm=algorithm, group=group, ops=get_ops("npu"))
    return attend, partial(own, cp=cp, rank=rank, algorithm=algorithm)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_results_and_gradients_are_those_of_whole_rows(algorithm, cp, dtype, groups):
    import torch

    from qwen2_ascend.ops import get_ops

    plain = get_ops("torch").attention
    attend, mine = shared(algorithm, groups[cp])
    for packing in ("dense", "one row", "two rows"):
        b, ends = PACKINGS[packing]
        *tensors, upstream = inputs(b, getattr(torch, dtype))
        wide = [x.double() for x in tensors]
        exact = output_and_gradients(plain, wide, upstream.double(), ends=ends)
        twin = output_and_gradients(plain, tensors, upstream, ends=ends)
        own_inputs = [mine(x).npu() for x in tensors]
        found = output_and_gradients(attend, own_inputs, mine(upstream).npu(), ends=ends)
        for one, other, right in zip(found, twin, exact, strict=True):
            limit = max(SLACK * error(other, right), torch.finfo(tensors[0].dtype).eps)
            assert error(one.cpu(), mine(right)) <= limit


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_swapped_tensors_are_waited_for(algorithm, groups):
    """--swap-attention: fresh memory on a simulated card is NaN until its copy has come."""
    import torch

    from qwen2_ascend.model.swap import AttentionSwap

    b, ends = PACKINGS["two rows"]
    attend, mine = shared(algorithm, groups[CARDS])
    *tensors, upstream = (mine(x).npu() for x in inputs(b, torch.bfloat16))
    swap = AttentionSwap(torch.device("npu"))

    def swapped(*leaves, **options):
        with swap.keeping_outside():
            return attend(*leaves, **options)

    expected = output_and_gradients(attend, tensors, upstream, ends=ends)
    found = output_and_gradients(swapped, tensors, upstream, ends=ends)
    assert all(map(torch.equal, expected, found))


def test_messages_are_those_of_the_ring(groups):
    """HCCL is asked to send keys and values to the next card, and their gradients after them."""
    import torch
    import torch.distributed as dist

    from npusim.cards import hccl_calls

    attend, mine = shared("megatron_cp_algo", groups[CARDS])
    *leaves, upstream = (mine(x).npu() for x in inputs(2, torch.bfloat16))
    before = len(hccl_calls())
    result = attend(*(x.requires_grad_() for x in leaves), softmax_scale=SCALE)
    result.backward(upstream)
    torch.npu.synchronize()
    calls = [call for call in hccl_calls()[before:] if call.op == "Send"]
    s, b, heads, width = leaves[0].shape
    sizes = {"tokens": s * b, "np": heads, "ng": leaves[1].shape[2], "hn": width, "element": 2}
    expected = sent_bytes("megatron_cp_algo", CARDS, **sizes)
    assert sum(call.num_bytes for call in calls) == sum(expected)
    following = dist.get_group_rank(groups[CARDS], (dist.get_rank() + 1) % CARDS)
    assert {call.peer for call in calls} == {following}


def test_a_ring_launches_one_operator_a_block(groups):
    """Forward and backward of whole rows: an operator for each of the blocks, none for masks."""
    import torch

    from npusim.simulator import recording

    attend, mine = shared("megatron_cp_algo", groups[CARDS])
    *leaves, upstream = (mine(x).npu() for x in inputs(2, torch.bfloat16))
    with recording() as record:
        attend(*(x.requires_grad_() for x in leaves), softmax_scale=SCALE).backward(upstream)
    attention = [op for op in record.ops if "FlashAttention" in op]
    assert attention == ["aclnnFlashAttentionScore"] * 4 + ["aclnnFlashAttentionScoreGrad"] * 4
    _, ends = PACKINGS["chunk by chunk"]
    with recording() as record:
        attend(*leaves, softmax_scale=SCALE, ends=ends).backward(upstream)
    attention = [op for op in record.ops if "FlashAttention" in op]
    # V4 is the one that lays the statistics out token by token
    forward, backward = "VarLenScoreV4", "UnpaddingScoreGradV4"
    assert attention == [f"aclnnFlashAttention{forward}", f"aclnnFlashAttention{backward}"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_nothing_waits_for_the_device(algorithm, groups):
    import torch

    from npusim.transfers import counting_transfers

    b, ends = PACKINGS["two rows"]
    attend, mine = shared(algorithm, groups[CARDS])
    *leaves, upstream = (mine(x).npu() for x in inputs(b, torch.bfloat16))
    leaves = [x.requires_grad_() for x in leaves]
    attend(*leaves, softmax_scale=SCALE, ends=ends).backward(upstream)  # makes the mask
    with counting_transfers() as transfers:
        attend(*leaves, softmax_scale=SCALE, ends=ends).backward(upstream)
    assert transfers == []
