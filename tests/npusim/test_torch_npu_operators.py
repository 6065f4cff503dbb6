"""torch_npu's fused operators, called directly: against plain torch and its autograd on the CPU.

The forward passes through torch_npu's genuine host code and so does the wiring of autograd; the
numbers come from references.py. What is compared with is written independently of both.
"""

from __future__ import annotations

import itertools

import pytest

pytestmark = pytest.mark.simulated

HEADS = [(14, 2), (28, 4), (4, 4)]
LAYOUTS = ["SBH", "BSH", "BSND", "BNSD"]
TOLERANCES = {"fp32": (5e-7, 1e-6), "bf16": (1e-2, 2e-2)}
"""Largest difference of the results and of the gradients, relative to the largest number."""


def dtype_of(name):
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def relative_error(found, expected):
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def compressed_mask():
    import torch

    return torch.ones(2048, 2048).triu(1).bool().npu()


def plain_attention(query, key, value, scale, visible=None):
    """query [b, np, s, hn], key and value [b, ng, s, hn]; True in `visible` where seen."""
    from torch.nn.functional import scaled_dot_product_attention

    return scaled_dot_product_attention(
        query, key, value, attn_mask=visible, scale=scale, enable_gqa=True
    )


def causal(queries, keys, corner="left"):
    import torch

    return torch.ones(queries, keys).tril(0 if corner == "left" else keys - queries).bool()


def as_layout(x, layout):
    """[b, n, s, d] in another layout."""
    if layout == "BNSD":
        return x
    if layout == "BSND":
        return x.transpose(1, 2)
    return x.permute(2, 0, 1, 3).flatten(2) if layout == "SBH" else x.transpose(1, 2).flatten(2)


def inputs(shapes, dtype, seed=0):
    """Leaves on the CPU and the same on the npu."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    ours = [value.npu().requires_grad_() for value in values]
    return [value.float().requires_grad_() for value in values], ours


def assert_same(expected, found, leaves, our_leaves, precision):
    """Compares results, and gradients under a random upstream gradient."""
    import torch

    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9))
    upstream = upstream.to(found.dtype)
    expected.backward(upstream.float())
    found.backward(upstream.npu())
    result_tolerance, gradient_tolerance = TOLERANCES[precision]
    assert relative_error(found, expected) < result_tolerance
    for ours, theirs in zip(our_leaves, leaves, strict=True):
        assert ours.grad.dtype == ours.dtype
        assert relative_error(ours.grad, theirs.grad) < gradient_tolerance


# --- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_causal_attention(layout, heads, precision):
    import torch_npu

    num_heads, groups = heads
    shapes = [(2, num_heads, 9, 16), (2, groups, 9, 16), (2, groups, 9, 16)]
    leaves, ours = inputs(shapes, dtype_of(precision))
    expected = plain_attention(*leaves, 0.25, causal(9, 9))
    found = torch_npu.npu_fusion_attention(
        *(as_layout(x, layout) for x in ours),
        num_heads,
        layout,
        atten_mask=compressed_mask(),
        scale=0.25,
        sparse_mode=2,
    )[0]
    assert_same(as_layout(expected, layout), found, leaves, ours, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_packed_attention(heads, precision):
    import torch
    import torch_npu

    num_heads, groups = heads
    ends = [5, 6, 13]
    leaves, ours = inputs([(13, n, 16) for n in (num_heads, groups, groups)], dtype_of(precision))
    parts = []
    for start, end in itertools.pairwise([0, *ends]):
        query, key, value = (x[start:end].transpose(0, 1)[None] for x in leaves)
        part = plain_attention(query, key, value, 0.25, causal(end - start, end - start))
        parts.append(part[0].transpose(0, 1))
    found = torch_npu.npu_fusion_attention(
        *ours,
        num_heads,
        "TND",
        atten_mask=compressed_mask(),
        scale=0.25,
        sparse_mode=2,
        actual_seq_qlen=ends,
        actual_seq_kvlen=ends,
    )[0]
    assert_same(torch.cat(parts), found, leaves, ours, precision)


@pytest.mark.parametrize("lengths", [(6, 6), (4, 9)], ids=str)
@pytest.mark.parametrize("sparse_mode", [0, 1, 2, 3, 4])
def test_every_sparse_mode(sparse_mode, lengths):
    import torch
    import torch_npu

    queries, keys = lengths
    leaves, ours = inputs([(2, 4, queries, 8), (2, 2, keys, 8), (2, 2, keys, 8)], torch.float32)
    options = {"pre_tockens": 2, "next_tockens": 1} if sparse_mode == 4 else {}
    if sparse_mode in (0, 1):
        visible = causal(queries, keys, "right")
        mask = ~visible.npu()
    else:
        visible = causal(queries, keys, "left" if sparse_mode == 2 else "right")
        mask = compressed_mask()
    if sparse_mode == 4:
        corner = keys - queries
        visible = torch.ones(queries, keys).tril(corner + 1).triu(corner - 2).bool()
    found = torch_npu.npu_fusion_attention(
        *ours, 4, "BNSD", atten_mask=mask, scale=0.3, sparse_mode=sparse_mode, **options
    )[0]
    assert_same(plain_attention(*leaves, 0.3, visible), found, leaves, ours, "fp32")


def test_queries_that_see_no_key_give_zero_in_right_down_mode():
    import torch
    import torch_npu

    leaves, ours = inputs([(1, 2, 6, 8), (1, 2, 4, 8), (1, 2, 4, 8)], torch.float32)
    found = torch_npu.npu_fusion_attention(
        *ours, 2, "BNSD", atten_mask=compressed_mask(), scale=0.3, sparse_mode=3
    )[0]
    assert found[:, :, :2].abs().max() == 0
    expected = plain_attention(leaves[0][:, :, 2:], *leaves[1:], 0.3, causal(4, 4))
    assert relative_error(found[:, :, 2:], expected) < 1e-6
    found.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in ours)


def attention_with_dropout(query, key, value, keep_prob):
    import torch_npu

    return torch_npu.npu_fusion_attention(
        query,
        key,
        value,
        4,
        "BNSD",
        atten_mask=compressed_mask(),
        scale=0.3,
        sparse_mode=2,
        keep_prob=keep_prob,
    )[0]


def test_dropout_follows_the_random_state():
    import torch

    _, ours = inputs([(1, 4, 8, 8)] * 3, torch.float32)
    torch.npu.manual_seed(3)
    state = torch.npu.get_rng_state()
    first, second = (attention_with_dropout(*ours, 0.8) for _ in range(2))
    torch.npu.set_rng_state(state)
    assert torch.equal(attention_with_dropout(*ours, 0.8), first)
    assert not torch.equal(first, second)
    assert not torch.equal(first, attention_with_dropout(*ours, 1.0))


def test_dropout_keeps_the_expectation():
    import torch

    _, ours = inputs([(1, 4, 8, 8)] * 3, torch.float32)
    copies = [x.detach().expand(400, -1, -1, -1).contiguous() for x in ours]
    mean = attention_with_dropout(*copies, 0.7).mean(0, keepdim=True)
    assert relative_error(mean, attention_with_dropout(*ours, 1.0)) < 0.15


def test_dropout_drops_the_same_weights_in_the_gradient():
    """With one-hot values the output shows which weights were dropped; so must value's gradient."""
    import torch

    _, ours = inputs([(1, 4, 8, 8)] * 3, torch.float32)
    value = torch.eye(8).expand(1, 4, 8, 8).contiguous().npu().requires_grad_()
    weights = attention_with_dropout(*ours[:2], value, 0.6)
    assert 0 < (weights == 0).tril().sum() < weights.numel()
    upstream = torch.randn(1, 4, 8, 8).npu()
    weights.backward(upstream)
    assert relative_error(value.grad, weights.transpose(-1, -2) @ upstream) < 1e-6
    # dL/dq by finite differences, with the same random numbers
    query = ours[0].detach().clone()
    state = torch.npu.get_rng_state()
    direction = torch.randn_like(query)

    def loss(step):
        torch.npu.set_rng_state(state)
        out = attention_with_dropout(query + step * direction, ours[1].detach(), value, 0.6)
        return (out.double() * upstream.double()).sum().item()

    torch.npu.set_rng_state(state)
    query.requires_grad_()
    attention_with_dropout(query, ours[1].detach(), value, 0.6).backward(upstream)
    slope = (query.grad * direction).sum().item()
    query = query.detach()
    assert (loss(1e-2) - loss(-1e-2)) / 2e-2 == pytest.approx(slope, rel=1e-2)


# --- wrong calls that torch_npu's host code lets pass ---------------------------------------------


def right_and_wrong(**changes):
    """Causal attention's error against plain torch, of the right call and of one with changes."""
    import torch
    import torch_npu

    leaves, ours = inputs([(2, 4, 9, 16)] * 3, torch.float32)
    expected = plain_attention(*leaves, 0.25, causal(9, 9))
    right = {"atten_mask": ~causal(9, 9).npu(), "scale": 0.25, "sparse_mode": 0}
    errors = []
    for options in (right, {**right, **changes}):
        options = {name: option for name, option in options.items() if option is not None}
        found = torch_npu.npu_fusion_attention(*ours, 4, "BNSD", **options)[0]
        errors.append(relative_error(found, expected))
    return errors


def test_an_inverted_mask_gives_other_numbers():
    right, wrong = right_and_wrong(atten_mask=causal(9, 9).npu())
    assert right < 1e-6
    assert not wrong < 0.1  # NaN where a query sees nothing


def test_a_missing_scale_gives_other_numbers():
    right, wrong = right_and_wrong(scale=None)
    assert right < 1e-6
    assert wrong > 0.1


def test_a_sparse_mode_without_a_mask_is_full_attention():
    import torch
    import torch_npu

    right, wrong = right_and_wrong(atten_mask=None, sparse_mode=2)
    assert right < 1e-6
    assert wrong > 0.1
    leaves, ours = inputs([(2, 4, 9, 16)] * 3, torch.float32)
    found = torch_npu.npu_fusion_attention(*ours, 4, "BNSD", scale=0.25, sparse_mode=2)[0]
    assert relative_error(found, plain_attention(*leaves, 0.25)) < 1e-6


def refused_attention(message, shapes=None, dtypes=None, layout="TND", **options):
    import torch
    import torch_npu

    from npusim.references import InvalidCall

    tensors = [
        torch.zeros(shape, dtype=dtype).npu()
        for shape, dtype in zip(
            shapes or [(13, 4, 8)] * 3, dtypes or [torch.float32] * 3, strict=True
        )
    ]
    call = {"atten_mask": compressed_mask(), "scale": 0.3, "sparse_mode": 2, **options}
    with pytest.raises(InvalidCall, match=message):
        torch_npu.npu_fusion_attention(*tensors, call.pop("heads", 4), layout, **call)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([0, 5, 13], "begins with 0"),
        ([5, 8], "ends at 8 and there are 13"),
        ([5, 3, 13], "not cumulative"),
    ],
)
def test_wrong_packed_lengths_are_refused(ends, message):
    refused_attention(message, actual_seq_qlen=ends, actual_seq_kvlen=ends)


def test_an_inverted_compressed_mask_is_refused():
    mask = ~compressed_mask()
    refused_attention("2048 x 2048", [(2, 4, 5, 8)] * 3, layout="BNSD", atten_mask=mask)


def test_head_counts_that_do_not_fit_are_refused():
    import torch

    refused_attention("has 4 heads, not 2", [(2, 4, 5, 8)] * 3, layout="BNSD", heads=2)
    shapes = [(2, 4, 5, 8), (2, 3, 5, 8), (2, 3, 5, 8)]
    refused_attention("4 query heads are no multiple of 3", shapes, layout="BNSD")
    dtypes = [torch.float32, torch.bfloat16, torch.float32]
    refused_attention("differ in dtype", [(2, 4, 5, 8)] * 3, dtypes, layout="BNSD")


# --- inference attention --------------------------------------------------------------------------


def test_prompt_of_inference_attention():
    import torch
    import torch_npu

    leaves, ours = inputs([(2, 4, 9, 16), (2, 2, 9, 16), (2, 2, 9, 16)], torch.bfloat16)
    expected = plain_attention(*leaves, 0.25, causal(9, 9))
    with torch.no_grad():
        found, _ = torch_npu.npu_fused_infer_attention_score(
            *ours,
            num_heads=4,
            num_key_value_heads=2,
            input_layout="BNSD",
            scale=0.25,
            sparse_mode=3,
            atten_mask=compressed_mask(),
        )
    assert relative_error(found, expected) < 1e-2


def test_one_token_of_inference_attention_sees_its_cache_so_far():
    import torch
    import torch_npu

    leaves, ours = inputs([(2, 4, 1, 16), (2, 2, 12, 16), (2, 2, 12, 16)], torch.bfloat16)
    lengths = [7, 12]
    with torch.no_grad():
        found, log_sum = torch_npu.npu_fused_infer_attention_score(
            *(as_layout(x, "BSND").contiguous() for x in ours),
            num_heads=4,
            num_key_value_heads=2,
            input_layout="BSND",
            scale=0.25,
            actual_seq_lengths_kv=lengths,
            softmax_lse_flag=True,
        )
    for index, length in enumerate(lengths):
        query, key, value = (x[index : index + 1] for x in leaves)
        expected = plain_attention(query, key[:, :, :length], value[:, :, :length], 0.25)
        assert relative_error(found[index : index + 1], as_layout(expected, "BSND")) < 1e-2
        scores = query @ key[:, :, :length].repeat_interleave(2, 1).transpose(-1, -2) * 0.25
        assert relative_error(log_sum[index], scores.logsumexp(-1)[0, :, :, None]) < 1e-5


def test_inference_attention_refuses_what_its_documents_do():
    import torch
    import torch_npu

    from npusim.references import InvalidCall

    x = torch.zeros(1, 4, 5, 8).npu()
    options = {"num_heads": 4, "input_layout": "BNSD", "scale": 0.3}
    with pytest.raises(InvalidCall, match="float32 is not supported"):
        torch_npu.npu_fused_infer_attention_score(x, x, x, **options)
    x = x.half()
    with pytest.raises(InvalidCall, match="sparse_mode=3 needs an atten_mask"):
        torch_npu.npu_fused_infer_attention_score(x, x, x, sparse_mode=3, **options)
    with pytest.raises(InvalidCall, match="heads of 8 are no multiple of 16"):
        torch_npu.npu_fused_infer_attention_score(x, x, x, **options)


# --- the others -----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rms_norm(precision):
    import torch_npu
    from torch.nn.functional import rms_norm

    leaves, ours = inputs([(5, 2, 24), (24,)], dtype_of(precision))
    expected = rms_norm(leaves[0], (24,), leaves[1], 1e-6)
    assert_same(expected, torch_npu.npu_rms_norm(*ours, 1e-6)[0], leaves, ours, precision)


def test_rms_norm_uses_its_epsilon():
    import torch
    import torch_npu

    x = torch.full((2, 8), 1e-3).npu()
    norm = torch_npu.npu_rms_norm(x, torch.ones(8).npu(), 1e-2)[0]
    torch.testing.assert_close(norm.cpu(), torch.full((2, 8), 1e-3 / (1e-6 + 1e-2) ** 0.5))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_swiglu(precision):
    import torch_npu
    from torch.nn.functional import silu

    leaves, ours = inputs([(5, 2, 24)], dtype_of(precision))
    expected = silu(leaves[0][..., :12]) * leaves[0][..., 12:]
    assert_same(expected, torch_npu.npu_swiglu(*ours), leaves, ours, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["half", "interleave"])
def test_rotary(mode, precision):
    """It rotates as complex numbers do."""
    import torch
    import torch_npu

    angles = torch.rand(5, 1, 1, 4) * 6
    join = torch.cat if mode == "half" else lambda pair, dim: torch.stack(pair, dim).flatten(-2)
    leaves, ours = inputs([(5, 2, 3, 8)], dtype_of(precision))
    cos, sin = (join((f(angles),) * 2, -1).to(ours[0].dtype) for f in (torch.cos, torch.sin))
    x = leaves[0]
    pairs = (x[..., :4], x[..., 4:]) if mode == "half" else (x[..., ::2], x[..., 1::2])
    cosine, sine = (
        t.float()[..., :4] if mode == "half" else t.float()[..., ::2] for t in (cos, sin)
    )
    turned = torch.complex(*pairs) * torch.complex(cosine, sine)
    expected = join((turned.real, turned.imag), -1)
    found = torch_npu.npu_rotary_mul(ours[0], cos.npu(), sin.npu(), mode)
    assert_same(expected, found, leaves, ours, precision)


def test_calls_whose_sizes_do_not_fit_are_refused():
    import torch
    import torch_npu

    from npusim.references import InvalidCall

    x = torch.zeros(5, 2, 3, 8).npu()
    with pytest.raises(InvalidCall, match="gamma"):
        torch_npu.npu_rms_norm(x, torch.ones(4).npu())
    with pytest.raises((InvalidCall, RuntimeError)):
        torch_npu.npu_swiglu(torch.zeros(2, 7).npu())
    short = torch.zeros(5, 1, 1, 4).npu()
    with pytest.raises((InvalidCall, RuntimeError)):
        torch_npu.npu_rotary_mul(x, short, short)


def test_scaled_dot_product_attention_reaches_the_fused_operator():
    import torch

    from npusim.simulator import recording

    leaves, ours = inputs([(2, 4, 9, 16)] * 3, torch.float32)
    expected = plain_attention(*leaves, 0.25, causal(9, 9))
    with recording() as record:
        found = torch.nn.functional.scaled_dot_product_attention(*ours, is_causal=True, scale=0.25)
    assert "aclnnFlashAttentionScore" in record.ops
    assert_same(expected, found, leaves, ours, "fp32")
