"""Each plain operator against its formula written out, in fp64, and its gradient."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from ops.mistakes import MISTAKES, call
from qwen2_ascend.errors import UserError
from qwen2_ascend.ops import get_ops

OPS = get_ops("torch")


def randn(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_attention_is_causal_softmax_over_grouped_heads(groups: int) -> None:
    s, b, heads, width = 5, 3, 6, 4
    q, k, v = randn(s, b, heads, width), randn(s, b, groups, width), randn(s, b, groups, width)
    found = OPS.attention(q, k, v, softmax_scale=0.3)
    for sequence in range(b):
        for head in range(heads):
            group = head // (heads // groups)
            scores = 0.3 * q[:, sequence, head] @ k[:, sequence, group].T
            scores = scores.masked_fill(torch.ones(s, s).triu(1).bool(), -torch.inf)
            expected = scores.softmax(-1) @ v[:, sequence, group]
            own = found[:, sequence, head * width : (head + 1) * width]
            torch.testing.assert_close(own, expected, rtol=0, atol=1e-14)


def test_attention_drops_weights() -> None:
    q, k, v = randn(8, 2, 4, 4), randn(8, 2, 2, 4), torch.ones(8, 2, 2, 4, dtype=torch.float64)
    torch.manual_seed(1)
    found = OPS.attention(q, k, v, softmax_scale=0.5, dropout_p=0.5)
    assert (found - 1).abs().max() > 0.1


@pytest.mark.parametrize("ends", [(4, 5, 12, 16, 18, 24), (12, 24)])
def test_packed_documents_do_not_see_each_other(ends: tuple[int, ...]) -> None:
    q, k, v = randn(12, 2, 6, 4), randn(12, 2, 2, 4), randn(12, 2, 2, 4)
    found = OPS.attention(q, k, v, softmax_scale=0.3, ends=ends)
    for start, end in pairwise((0, *ends)):
        row, first, last = start // 12, start % 12, (end - 1) % 12 + 1
        alone = [x[first:last, row : row + 1] for x in (q, k, v)]
        expected = OPS.attention(*alone, softmax_scale=0.3)
        torch.testing.assert_close(found[first:last, row], expected[:, 0], rtol=0, atol=1e-14)


@pytest.mark.parametrize(("b", "ends"), [(1, (4, 12)), (2, (12, 24)), (1, None), (2, None)])
def test_attention_gives_plain_strides(b: int, ends: tuple[int, ...] | None) -> None:
    """matmul copies its weight for every token of an input whose axis of 1 has an odd stride."""
    q, k, v = randn(12, b, 6, 4), randn(12, b, 2, 4), randn(12, b, 2, 4)
    found = OPS.attention(q, k, v, softmax_scale=0.3, ends=ends)
    assert found.stride() == (b * 24, 24, 1)


@pytest.mark.parametrize(("s", "b"), [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_cached_attention_gives_plain_strides(s: int, b: int) -> None:
    keys, values = randn(b, 2, 11, 4), randn(b, 2, 11, 4)
    lengths = [9, 7, 4][:b]
    found = OPS.cached_attention(
        randn(s, b, 6, 4), keys, values, lengths=lengths, softmax_scale=0.3
    )
    assert found.stride() == (b * 24, 24, 1)


@pytest.mark.parametrize("new_tokens", [1, 3])
def test_cached_attention_is_the_end_of_attention(new_tokens: int) -> None:
    lengths = [7, 4, 9]
    keys, values = randn(3, 2, 11, 4), randn(3, 2, 11, 4)
    q = randn(new_tokens, 3, 6, 4)
    found = OPS.cached_attention(q, keys, values, lengths=lengths, softmax_scale=0.3)
    for row, length in enumerate(lengths):
        whole_q = torch.zeros(length, 1, 6, 4, dtype=torch.float64)
        whole_q[-new_tokens:, 0] = q[:, row]
        whole = [x[row, :, :length].transpose(0, 1).unsqueeze(1) for x in (keys, values)]
        expected = OPS.attention(whole_q, *whole, softmax_scale=0.3)[-new_tokens:, 0]
        torch.testing.assert_close(found[:, row], expected, rtol=0, atol=1e-14)


def test_rms_norm() -> None:
    x, weight = randn(3, 2, 8), randn(8)
    expected = torch.stack([row / ((row**2).sum() / 8 + 1e-3).sqrt() for row in x.flatten(0, 1)])
    found = OPS.rms_norm(x, weight, 1e-3)
    torch.testing.assert_close(found.flatten(0, 1), expected * weight, rtol=0, atol=1e-14)


def test_rms_norm_of_bf16_is_taken_in_fp32() -> None:
    x = (randn(4, 2, 64) * 1e4).bfloat16()
    found = OPS.rms_norm(x, torch.ones(64, dtype=torch.bfloat16), 1e-6)
    expected = OPS.rms_norm(x.float(), torch.ones(64), 1e-6)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_keeps_x_and_one_number_a_token_for_backward(dtype: torch.dtype) -> None:
    x, weight = randn(4, 2, 64).to(dtype), randn(64).to(dtype)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        OPS.rms_norm(x, weight, 1e-6)
    kept = [t for t in kept if t.data_ptr() not in (x.data_ptr(), weight.data_ptr())]
    assert [t.numel() for t in kept] == [8]


def test_gradients_of_rms_norm_of_bf16_are_as_near_as_autograd_takes_them() -> None:
    """The reference is fp64; autograd's are those of the formula written out."""

    def written_out(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        return (wide * scale).to(x.dtype) * weight

    def gradients(function, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.bfloat16().to(dtype).detach().requires_grad_() for x in (x, weight)]
        function(*leaves, 1e-6).backward(upstream.bfloat16().to(dtype))
        return [leaf.grad.double() for leaf in leaves]

    x, weight, upstream = randn(40, 2, 64), randn(64), randn(40, 2, 64).detach().flip(0)
    exact = gradients(OPS.rms_norm, torch.float64)
    own = gradients(OPS.rms_norm, torch.bfloat16)
    theirs = gradients(written_out, torch.bfloat16)
    for found, other, right in zip(own, theirs, exact, strict=True):
        assert (found - right).abs().max() <= 1.5 * (other - right).abs().max()


def test_rotary_turns_each_pair_by_its_angle() -> None:
    x, angles = randn(5, 2, 3, 8), randn(5, 4)
    both = torch.cat((angles, angles), dim=-1)
    found = OPS.rotary(x, both.cos(), both.sin())
    turned = torch.view_as_complex(torch.stack(x.chunk(2, -1), dim=-1).contiguous())
    turned = turned * torch.polar(torch.ones_like(angles), angles)[:, None, None]
    torch.testing.assert_close(found, torch.cat((turned.real, turned.imag), -1), rtol=0, atol=1e-14)


def test_rotary_takes_positions_of_each_sequence() -> None:
    x, cos, sin = randn(5, 2, 3, 8), randn(5, 2, 8), randn(5, 2, 8)
    found = OPS.rotary(x, cos, sin)
    for row in range(2):
        expected = OPS.rotary(x[:, row : row + 1], cos[:, row], sin[:, row])
        torch.testing.assert_close(found[:, row : row + 1], expected, rtol=0, atol=0)


def test_swiglu_gates_with_the_first_half() -> None:
    x = randn(2, 3, 8)
    gate, up = x[..., :4], x[..., 4:]
    expected = gate / (1 + torch.exp(-gate)) * up
    torch.testing.assert_close(OPS.swiglu(x), expected, rtol=0, atol=1e-14)


GRADIENTS = {
    "attention": (OPS.attention, [(3, 2, 4, 2), (3, 2, 2, 2), (3, 2, 2, 2)], {}),
    "packed attention": (
        OPS.attention,
        [(5, 1, 4, 2), (5, 1, 2, 2), (5, 1, 2, 2)],
        {"ends": (2, 5)},
    ),
    "packed rows": (
        OPS.attention,
        [(4, 2, 2, 2), (4, 2, 1, 2), (4, 2, 1, 2)],
        {"ends": (1, 4, 6, 8)},
    ),
    "rms_norm": (OPS.rms_norm, [(3, 2, 4), (4,)], {"epsilon": 1e-6}),
    "rotary": (OPS.rotary, [(3, 2, 2, 4), (3, 4), (3, 4)], {}),
    "rotary of each sequence": (OPS.rotary, [(3, 2, 2, 2, 4), (3, 2, 4), (3, 2, 4)], {}),
    "swiglu": (OPS.swiglu, [(3, 2, 4)], {}),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name: str) -> None:
    operator, shapes, options = GRADIENTS[name]
    if operator is OPS.attention:
        options = {"softmax_scale": 0.7, **options}
    inputs = [randn(*shape) for shape in shapes]
    if operator is OPS.rotary:  # the tables are constants, equal in both halves
        tables = (x.detach() for x in inputs[1:])
        inputs[1:] = [x[..., :2].repeat(*[1] * (x.dim() - 1), 2) for x in tables]
    assert torch.autograd.gradcheck(lambda *leaves: operator(*leaves, **options), inputs)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused(name: str) -> None:
    wrong, message = MISTAKES[name]
    for ops in (OPS, get_ops("torch", plain=OPS._fields)):
        with pytest.raises(ValueError, match=message):
            call(ops, wrong, to=lambda x: x)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(UserError, match="backend='fast' is not known"):
        get_ops("fast")


def test_an_unknown_plain_operator_is_refused() -> None:
    with pytest.raises(UserError, match="plain=softmax is not an operator"):
        get_ops("torch", plain=["softmax"])


def test_the_npu_backend_without_torch_npu_is_refused() -> None:
    with pytest.raises(UserError, match="needs torch_npu, which cannot be imported"):
        get_ops("npu")
