"""The fused operators behind ops/ against their plain twins, forward and gradient."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.simulated


@pytest.mark.parametrize("ends", [None, (4, 9, 18)], ids=["dense", "packed"])
def test_attention(ends):
    import torch

    from qwen2_ascend.ops import get_ops

    torch.manual_seed(3)
    leaves = [torch.randn(9, 2, n, 16, requires_grad=True) for n in (14, 2, 2)]
    ours = [x.detach().npu().requires_grad_() for x in leaves]
    upstream = torch.randn(9, 2, 14 * 16)
    expected = get_ops("torch").attention(*leaves, softmax_scale=0.25, ends=ends)
    found = get_ops("npu").attention(*ours, softmax_scale=0.25, ends=ends)
    expected.backward(upstream)
    found.backward(upstream.npu())
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=2e-6)
    for own, leaf in zip(ours, leaves, strict=True):
        torch.testing.assert_close(own.grad.cpu(), leaf.grad, rtol=0, atol=4e-6)
