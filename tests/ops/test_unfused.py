"""Attention written out, for `--attention-backend unfused`, against the one call."""

from __future__ import annotations

import pytest
import torch

from qwen2_ascend.ops import get_ops
from qwen2_ascend.ops.attention import attention
from qwen2_ascend.ops.unfused import attention as unfused

HEADS, GROUPS, WIDTH = 6, 2, 8


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(9, 2, n, WIDTH, dtype=dtype, generator=generator).requires_grad_()
        for n in (HEADS, GROUPS, GROUPS)
    ]


@pytest.mark.parametrize("ends", [None, (4, 9, 10, 18)], ids=["dense", "packed"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 3e-6)])
def test_output_and_gradients_are_those_of_the_one_call(ends, dtype, tolerance) -> None:
    generator = torch.Generator().manual_seed(2)
    upstream = torch.randn(9, 2, HEADS * WIDTH, dtype=dtype, generator=generator)
    found = []
    for function in (attention, unfused):
        leaves = inputs(dtype)
        output = function(*leaves, softmax_scale=0.3, ends=ends)
        output.backward(upstream)
        found.append([output, *(leaf.grad for leaf in leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def test_half_precision_is_as_near_as_the_one_call() -> None:
    leaves = [x.detach() for x in inputs(torch.float64)]
    exact = attention(*leaves, softmax_scale=0.3)
    halves = [x.bfloat16() for x in leaves]
    own, theirs = (f(*halves, softmax_scale=0.3) - exact for f in (unfused, attention))
    assert own.dtype == torch.float64 and own.abs().max() <= 2 * theirs.abs().max()


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    torch.manual_seed(2)
    q, k = torch.zeros(64, 8, 4, 8), torch.zeros(64, 8, 2, 8)
    v = torch.ones(64, 8, 2, 8)
    dropped = unfused(q, k, v, softmax_scale=1.0, dropout_p=0.25)
    assert abs(dropped.mean().item() - 1) < 0.01
    # the first token has one weight: it is dropped, or scaled up
    first = dropped[0].unflatten(-1, (4, 8))[..., 0]
    assert first.unique().tolist() == pytest.approx([0, 4 / 3])
    torch.testing.assert_close(unfused(q, k, v, softmax_scale=1.0), torch.ones(64, 8, 32))


def test_switching_attention_off_takes_it_on_every_backend() -> None:
    assert get_ops("torch", plain=["attention"]).attention is unfused
    assert get_ops("torch", plain=["rms_norm"]).attention is attention
