"""The fused operators behind ops/ against their plain twins, forward and gradient.

Tolerances are measured: on the same rounded inputs the plain twin is run in fp64, which is taken
for exact, and in the dtype itself, whose error is the noise. A fused operator may be SLACK times as
far from exact as that, since it rounds in other places, or as one rounding of the dtype. All errors
are relative to the largest number of the result.
"""

from __future__ import annotations

import ast
import logging
from functools import partial
from pathlib import Path

import pytest

from ops.mistakes import MISTAKES, call

pytestmark = pytest.mark.simulated

PLUGIN = Path(__file__).parents[2] / "plugin"
SLACK = 3
DTYPES = ["float32", "bfloat16", "float16"]
HEADS = [(14, 2, 64), (28, 4, 128)]
"""np, ng, hn: Qwen2.5-0.5B's and 7B's."""
PACKINGS = {
    "dense": (2, None),
    "packed": (1, (5, 6, 24)),
    "packed rows": (2, (5, 6, 24, 40, 48)),
}
"""Micro-batch and where the documents end, of sequences of 24 tokens."""

dtypes = pytest.mark.parametrize("dtype", DTYPES)
heads = pytest.mark.parametrize("heads", HEADS, ids=["14/2", "28/4"])
packings = pytest.mark.parametrize("packing", PACKINGS)


def randn(*shape, seed=0):
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def run(operator, tensors, constants=(), **options):
    """The result, and the gradients of `tensors`, under an upstream gradient that is always one."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    result = operator(*leaves, *constants, **options)
    result.backward(randn(*result.shape, seed=99).to(result))
    return [result.detach(), *(leaf.grad for leaf in leaves)]


def error(found, exact):
    assert found.shape == exact.shape
    return ((found.double().cpu() - exact).abs().max() / exact.abs().max()).item()


def assert_close(found, twin, exact, dtype):
    """`found` is as near to `exact` as the noise of its dtype allows."""
    import torch

    for own, noisy, right in zip(found, twin, exact, strict=True):
        assert own.dtype == noisy.dtype == getattr(torch, dtype)
        allowed = SLACK * max(error(noisy, right), torch.finfo(own.dtype).eps)
        assert error(own, right) <= allowed


def assert_same(name, tensors, dtype, constants=(), **options):
    """The fused operator gives what its plain twin gives: result and gradients."""
    import torch

    from qwen2_ascend.ops import get_ops

    plain, fused = getattr(get_ops("torch"), name), getattr(get_ops("npu"), name)
    rounded = [x.to(getattr(torch, dtype)) for x in tensors]
    fixed = [x.to(getattr(torch, dtype)) for x in constants]
    doubles = [x.double() for x in rounded], [x.double() for x in fixed]
    found = run(fused, [x.npu() for x in rounded], [x.npu() for x in fixed], **options)
    assert_close(
        found, run(plain, rounded, fixed, **options), run(plain, *doubles, **options), dtype
    )


def qkv_of(heads, b, s=24):
    num_heads, groups, width = heads
    return [randn(s, b, n, width, seed=i) for i, n in enumerate((num_heads, groups, groups))]


# --- what they compute ----------------------------------------------------------------------------


@dtypes
@heads
@packings
def test_attention(packing, heads, dtype):
    b, ends = PACKINGS[packing]
    assert_same("attention", qkv_of(heads, b), dtype, softmax_scale=heads[2] ** -0.5, ends=ends)


def cached(dtype, heads, new_tokens):
    """Inputs and options of cached_attention: three sequences of different lengths."""
    import torch

    num_heads, groups, width = heads
    q = randn(new_tokens, 3, num_heads, width)
    keys, values = (randn(3, groups, 40, width, seed=i) for i in (1, 2))
    options = {"lengths": [7, 40, 23], "softmax_scale": width**-0.5}
    return [x.to(getattr(torch, dtype)) for x in (q, keys, values)], options


@dtypes
@heads
@pytest.mark.parametrize("new_tokens", [1, 5], ids=["decode", "prefill"])
def test_cached_attention(new_tokens, heads, dtype):
    import torch

    from qwen2_ascend.ops import get_ops

    inputs, options = cached(dtype, heads, new_tokens)
    plain = get_ops("torch").cached_attention
    with torch.no_grad():
        found = get_ops("npu").cached_attention(*(x.npu() for x in inputs), **options)
        twin, exact = plain(*inputs, **options), plain(*(x.double() for x in inputs), **options)
    assert_close([found], [twin], [exact], dtype)


@dtypes
@pytest.mark.parametrize("shape", [(12, 2, 896), (3, 1, 3584)], ids=str)
def test_rms_norm(shape, dtype):
    weight = 1 + 0.3 * randn(shape[-1])
    assert_same("rms_norm", [randn(*shape), weight], dtype, epsilon=1e-6)


@dtypes
@pytest.mark.parametrize("of_each_sequence", [False, True], ids=["one position", "packed"])
@pytest.mark.parametrize("shape", [(12, 2, 2, 7, 64), (12, 2, 4, 128), (12, 1, 2, 7, 64)], ids=str)
def test_rotary(shape, of_each_sequence, dtype):
    s, b, width = shape[0], shape[1], shape[-1]
    angles = 3 * randn(s, b, width // 2) if of_each_sequence else 3 * randn(s, width // 2)
    angles = angles.repeat_interleave(2, dim=-1)[..., [*range(0, width, 2), *range(1, width, 2)]]
    assert_same("rotary", [randn(*shape)], dtype, constants=[angles.cos(), angles.sin()])


@dtypes
def test_swiglu(dtype):
    assert_same("swiglu", [randn(12, 2, 2 * 48)], dtype)


def rotated_attention(qkv, cos, sin, *, ops, heads, ends):
    """Attention from linear_qkv's output on as the model does it: views, rotation, attention."""
    num_heads, groups, width = heads
    blocks = qkv.unflatten(2, (groups, num_heads // groups + 2, width))
    q, k, v = blocks.split((num_heads // groups, 1, 1), dim=3)
    q, k = ops.rotary(q, cos, sin).flatten(2, 3), ops.rotary(k, cos, sin).flatten(2, 3)
    return ops.attention(q, k, v.flatten(2, 3), softmax_scale=width**-0.5, ends=ends)


def rotated_attention_inputs(heads, packing):
    """linear_qkv's output, cos and sin, and where the documents end."""
    num_heads, groups, width = heads
    b, ends = PACKINGS[packing]
    angles = randn(24, width // 2) if ends is None else randn(24, b, width // 2)
    angles = angles.repeat(*[1] * (angles.dim() - 1), 2)
    return randn(24, b, (num_heads + 2 * groups) * width), angles.cos(), angles.sin(), ends


@heads
@packings
def test_attention_of_views_of_linear_qkv(packing, heads):
    from qwen2_ascend.ops import get_ops

    qkv, *tables, ends = rotated_attention_inputs(heads, packing)
    plain, fused = (
        partial(rotated_attention, ops=get_ops(name), heads=heads, ends=ends)
        for name in ("torch", "npu")
    )
    exact = run(plain, [qkv.double()], [x.double() for x in tables])
    found = run(fused, [qkv.npu()], [x.npu() for x in tables])
    assert_close(found, run(plain, [qkv], tables), exact, "float32")


def launched_attention(b, monkeypatch=None):
    """The launches of the 7B's attention of b short sequences and of its gradient, and results."""
    import torch

    from npusim.simulator import recording
    from qwen2_ascend.ops import get_ops, npu

    if monkeypatch is not None:
        monkeypatch.setattr(npu, "_MAX_STRIDE", 10**9)
    tensors = [x.bfloat16().npu() for x in qkv_of((28, 4, 128), b, 3)]
    with recording() as record:
        found = run(get_ops("npu").attention, tensors, softmax_scale=128**-0.5)
    torch.npu.synchronize()
    own = [launch for launch in record.launches if "FlashAttention" in launch.op]
    assert len(own) == 2
    return own, found


def test_a_large_batch_lies_so_that_cann_transposes_nothing(monkeypatch):
    """19 sequences of the 7B's 28 heads of 128 are more than 65,535 numbers from token to token."""
    from npusim.launches import hidden_copies

    small, _ = launched_attention(18)
    large, found = launched_attention(19)
    assert all("'SBH'" in launch.arguments for launch in small)
    assert all("'BSND'" in launch.arguments for launch in large)
    forced, other = launched_attention(19, monkeypatch)
    assert all("'SBH'" in launch.arguments for launch in forced)
    for own, same in zip(found, other, strict=True):
        assert own.equal(same)
    q, k = 2 * 19 * 3 * 28 * 128, 2 * 19 * 3 * 4 * 128
    assert [hidden_copies(launch) for launch in small] == [[], []]
    # of the result's gradient, which is the next layer's in another order
    assert [hidden_copies(launch) for launch in large] == [[], [2 * q]]
    copied = [sorted(hidden_copies(launch)) for launch in forced]
    assert copied == [[2 * k] * 2 + [2 * q] * 2, [2 * k] * 4 + [2 * q] * 4]


# --- dropout --------------------------------------------------------------------------------------


def dropped(inputs, packing, dropout_p=0.4, through=None):
    """Attention with dropout: the result and the gradients of q, k, v."""
    from qwen2_ascend.ops import get_ops

    attend = partial(
        get_ops("npu").attention,
        softmax_scale=0.25,
        dropout_p=dropout_p,
        ends=PACKINGS[packing][1],
    )
    return run(through(attend) if through else attend, inputs)


@packings
def test_dropout_follows_the_random_state_and_recompute_repeats_it(packing):
    import torch
    from torch.utils.checkpoint import checkpoint

    inputs = [x.npu() for x in qkv_of((4, 2, 16), PACKINGS[packing][0])]
    torch.npu.manual_seed(5)
    first, second = dropped(inputs, packing), dropped(inputs, packing)
    torch.npu.manual_seed(5)
    recomputed = dropped(
        inputs, packing, through=lambda attend: partial(checkpoint, attend, use_reentrant=False)
    )
    assert not torch.equal(first[0], second[0])
    assert all(map(torch.equal, first, recomputed))


@packings
def test_dropout_drops_the_same_weights_in_the_gradient(packing):
    """The result is linear in v, so v and its gradient give the result's own product back."""
    import torch

    q, k, v = (x.npu() for x in qkv_of((4, 2, 16), PACKINGS[packing][0]))
    torch.npu.manual_seed(5)
    result, _, _, d_v = dropped((q, k, v), packing)
    other, *_ = dropped((q, k, v), packing)
    upstream = randn(*result.shape, seed=99).npu()

    def product(a, b):
        return (a.double() * b.double()).sum().item()

    assert product(v, d_v) == pytest.approx(product(result, upstream), rel=1e-5)
    assert product(v, d_v) != pytest.approx(product(other, upstream), rel=1e-2)


def test_dropout_keeps_the_expectation():
    import torch

    # v is 1 everywhere: without dropout the result is 1, with it 1 on average.
    q, k, _ = (x.npu() for x in qkv_of((4, 2, 16), 2))
    ones = torch.ones(24, 2, 2, 16).npu()
    result, *_ = dropped((q, k, ones), "dense")
    assert result.std() > 0.1
    assert result.mean().item() == pytest.approx(1, abs=0.1)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused(name):
    from qwen2_ascend.ops import get_ops

    wrong, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        call(get_ops("npu"), wrong, to=lambda x: x.npu())


def expanded(*shape, dtype=None):
    """Zeros of any size in the memory of one."""
    import torch

    return torch.zeros(1, dtype=dtype).npu().expand(shape)


@pytest.mark.parametrize(
    ("shape", "ends", "message"),
    [
        ((4, 1, 257, 8), None, "257 query heads on one rank, at most 256"),
        ((4, 1, 1, 770), None, "heads of 770, at most 768"),
        ((4, 1, 1, 6), None, "heads of 6 in fp32, only multiples of 4"),
        ((2**20 + 1, 1, 1, 4), None, "1048577 tokens at once"),
        ((500_001, 2, 1, 4), (500_001, 1_000_002), "1000002 tokens at once, at most 1000000"),
        ((2049, 1, 1, 4), tuple(range(1, 2050)), "2049 packed documents at once, at most 2048"),
    ],
)
def test_attention_beyond_the_operators_limits_is_refused(shape, ends, message):
    from qwen2_ascend.errors import UserError
    from qwen2_ascend.ops import get_ops

    inputs = [expanded(*shape)] * 3
    with pytest.raises(UserError, match=message):
        get_ops("npu").attention(*inputs, softmax_scale=0.3, ends=ends)


def test_every_fault_is_named_at_once():
    from qwen2_ascend.errors import UserError
    from qwen2_ascend.ops import get_ops

    inputs = [expanded(4, 1, 300, 770)] * 3
    with pytest.raises(UserError) as caught:
        get_ops("npu").attention(*inputs, softmax_scale=0.3)
    assert len(caught.value.faults) == 3


@pytest.mark.parametrize("name", ["attention", "rms_norm", "rotary", "swiglu"])
def test_fp64_is_refused(name):
    import torch

    from qwen2_ascend.errors import UserError
    from qwen2_ascend.ops import get_ops

    x = expanded(4, 1, 2, 8, dtype=torch.float64)
    inputs = {
        "attention": (x, x, x),
        "rms_norm": (x, expanded(8, dtype=torch.float64), 1e-6),
        "rotary": (x, *[expanded(4, 8, dtype=torch.float64)] * 2),
        "swiglu": (x,),
    }[name]
    options = {"softmax_scale": 0.3} if name == "attention" else {}
    with pytest.raises(UserError, match=r"float64 is not .* \(backend 'torch'\)"):
        getattr(get_ops("npu"), name)(*inputs, **options)


@pytest.mark.parametrize("shape", [(1, 1000, 2, 8), (1, 1, 1000, 8)], ids=str)
def test_rotary_beyond_the_operators_limits_is_refused(shape):
    from qwen2_ascend.errors import UserError
    from qwen2_ascend.ops import get_ops

    with pytest.raises(UserError, match="less than 1000 sequences and heads"):
        get_ops("npu").rotary(expanded(*shape), *[expanded(1, 8)] * 2)


def test_a_cache_with_gaps_is_refused():
    import torch

    from qwen2_ascend.ops import get_ops

    q, keys = torch.zeros(1, 2, 2, 16).half().npu(), torch.zeros(2, 1, 18, 16).half().npu()
    with pytest.raises(ValueError, match="contiguous cache"):
        get_ops("npu").cached_attention(
            q, *[keys[:, :, ::2]] * 2, lengths=[4, 9], softmax_scale=0.3
        )


@pytest.mark.parametrize(
    ("dtype", "heads", "reason"),
    [
        ("float32", (4, 2, 16), "torch.float32"),
        ("float16", (4, 2, 24), "heads of 24"),
        ("float16", (130, 2, 16), "130 query heads on 2 groups"),
    ],
)
def test_what_the_inference_operator_cannot_do_plain_torch_does_and_says_so_once(
    dtype, heads, reason, caplog
):
    from qwen2_ascend.ops import get_ops, npu

    npu._warn_once.cache_clear()
    inputs, options = cached(dtype, heads, 1)
    inputs = [x.npu() for x in inputs]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = get_ops("npu").cached_attention(*inputs, **options)
    assert found.isfinite().all()
    (message,) = caplog.messages
    assert f"does not take {reason}: attention over the cache is plain torch" in message


# --- the mask, and what stays on the host ---------------------------------------------------------


def test_every_call_of_fused_attention_has_the_causal_mask():
    """Without one it attends to later tokens, whatever the mode says, so no argument removes it."""
    calls = [
        node
        for path in PLUGIN.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and "npu_fusion_attention" in ast.unparse(node.func)
    ]
    masks = [
        (given.get("atten_mask"), given.get("sparse_mode"))
        for given in ({kw.arg: ast.unparse(kw.value) for kw in call.keywords} for call in calls)
    ]
    of_blocks = "launch.mask(q.device)", "launch.sparse_mode"  # forward and its gradient
    whole = "_causal_mask(q.device)", "_CAUSAL_FROM_START"
    assert sorted(masks) == sorted([whole, of_blocks, of_blocks])


def test_causal_pieces_have_the_mask_and_full_ones_none():
    import torch

    from qwen2_ascend.ops import npu
    from qwen2_ascend.ops.blocks import Block

    q, k = torch.zeros(8, 1, 4, 16).npu(), torch.zeros(8, 1, 2, 16).npu()
    for causal in (True, False):
        block = Block(range(1), range(4), range(8), causal)
        launch = npu._Launch.of([block], q, k)
        assert launch.sparse_mode == (3 if causal else 0)
        assert launch.mask(q.device) is (npu._causal_mask(q.device) if causal else None)


@pytest.mark.parametrize(
    ("tokens", "blocks", "message"),
    [
        (2**20 + 1, 1, "1048577 tokens at once, at most 1048576"),
        (1, 2049, "2049 packed documents at once, at most 2048"),
    ],
)
def test_blocks_beyond_the_limits_are_refused(tokens, blocks, message):
    from qwen2_ascend.errors import UserError
    from qwen2_ascend.ops import get_ops
    from qwen2_ascend.ops.blocks import Block

    q = k = expanded(tokens * blocks, 1, 2, 16)
    own = (range(n * tokens, (n + 1) * tokens) for n in range(blocks))
    launch = [Block(range(1), places, places, True) for places in own]
    with pytest.raises(UserError, match=message):
        get_ops("npu").partial_attention.forward(q, k, k, launch, softmax_scale=1.0)


def test_the_mask_is_made_once_for_each_device(simulator):
    import torch

    from npusim.simulator import recording
    from qwen2_ascend.ops import get_ops, npu

    npu._causal_mask.cache_clear()
    simulator.host_code = True
    with recording() as record:
        for device in ("npu:0", "npu:1", "npu:0", "npu:1"):
            with torch.npu.device(device):
                for packing in PACKINGS:
                    b, ends = PACKINGS[packing]
                    q, k, v = (x.to(device) for x in qkv_of((4, 2, 16), b))
                    get_ops("npu").attention(q, k, v, softmax_scale=0.25, ends=ends)
                inputs, options = cached("float16", (4, 2, 16), 5)
                get_ops("npu").cached_attention(*(x.to(device) for x in inputs), **options)
    assert record.ops.count("aclnnTriu") == 2
    masks = [x for x in record.launches if "bool[2048,2048]" in x.arguments and "Att" in x.op]
    assert len(masks) == 4 * (len(PACKINGS) + 1)


def test_a_mask_made_in_inference_mode_serves_training():
    import torch

    from qwen2_ascend.ops import get_ops, npu

    npu._causal_mask.cache_clear()
    q, k, v = (x.npu() for x in qkv_of((4, 2, 16), 2))
    with torch.inference_mode():
        get_ops("npu").attention(q, k, v, softmax_scale=0.25)
    run(partial(get_ops("npu").attention, softmax_scale=0.25), (q, k, v))


def waiting_for_the_device():
    """A mode in which an operator that brings numbers to the host is an error."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class NoWaiting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            results = func(*args, **(kwargs or {}))
            inputs, outputs = tree_leaves((args, kwargs)), tree_leaves(results)
            on_npu = any(getattr(x, "is_npu", False) for x in inputs)
            if on_npu and not all(getattr(x, "is_npu", True) for x in outputs if x is not None):
                raise AssertionError(f"{func.name()} brings numbers to the host")
            numbers = any(isinstance(x, (int, float, bool)) for x in outputs)
            if on_npu and numbers and func.namespace != "npu":  # theirs are seeds and lengths
                raise AssertionError(f"{func.name()} brings a number to the host")
            return results

    return NoWaiting()


@pytest.mark.parametrize(
    "read", [lambda x: x.cpu(), lambda x: x.sum().item(), lambda x: x.tolist()]
)
def test_waiting_for_the_device_is_seen(read):
    import torch

    x = torch.ones(3).npu()
    with waiting_for_the_device(), pytest.raises(AssertionError, match="to the host"):
        read(x)


@packings
def test_nothing_waits_for_the_device(packing):
    from qwen2_ascend.ops import get_ops

    ops = get_ops("npu")
    qkv, *tables, ends = rotated_attention_inputs((4, 2, 16), packing)
    qkv, tables = qkv.npu().requires_grad_(), [x.npu() for x in tables]
    upstream = randn(*qkv.shape[:2], 64).npu()
    weight = randn(64).npu().requires_grad_()
    ops.attention(*[randn(1, 1, 1, 8).npu()] * 3, softmax_scale=1.0)  # makes the mask
    with waiting_for_the_device():
        context = rotated_attention(qkv, *tables, ops=ops, heads=(4, 2, 16), ends=ends)
        y = ops.swiglu(ops.rms_norm(context, weight, 1e-6)).repeat(1, 1, 2)
        y.backward(upstream)
    inputs, options = cached("float16", (4, 2, 16), 1)
    inputs = [x.npu() for x in inputs]
    with waiting_for_the_device():
        ops.cached_attention(*inputs, **options)


# --- what is launched and kept --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("packing", "forward", "backward"),
    [
        ("dense", "FlashAttentionScore", "FlashAttentionScoreGrad"),
        ("packed", "FlashAttentionVarLenScore", "FlashAttentionUnpaddingScoreGrad"),
    ],
)
def test_the_launches_of_attention_from_linear_qkv_on(packing, forward, backward, simulator):
    """The fused operators, one copy (of v), and linear_qkv's gradient put together: no more."""
    from npusim.simulator import recording
    from qwen2_ascend.ops import get_ops

    heads = (14, 2, 64)
    qkv, *tables, ends = rotated_attention_inputs(heads, packing)
    qkv, tables = qkv.npu().requires_grad_(), [x.npu() for x in tables]
    get_ops("npu").attention(*[randn(1, 1, 1, 8).npu()] * 3, softmax_scale=1.0)  # makes the mask
    upstream = randn(24, qkv.shape[1], 14 * 64).npu()
    simulator.host_code = True
    with recording() as record:
        result = rotated_attention(qkv, *tables, ops=get_ops("npu"), heads=heads, ends=ends)
    rotary = "aclnnRotaryPositionEmbedding"
    assert record.ops == [f"{rotary}V2", f"{rotary}V2", "aclnnInplaceCopy", f"aclnn{forward}"]
    with recording() as record:
        result.backward(upstream)
    assert record.ops == [f"aclnn{backward}", f"{rotary}Grad", f"{rotary}Grad", "aclnnCat"]


def test_rotary_keeps_only_its_tables_for_backward():
    import torch

    from npusim.simulator import recording
    from qwen2_ascend.ops import get_ops

    kept = []
    x, table = randn(6, 2, 2, 7, 8).npu().requires_grad_(), randn(6, 8).npu()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks:
        y = get_ops("npu").rotary(x, table, table)
    assert {t.untyped_storage().data_ptr() for t in kept} == {table.untyped_storage().data_ptr()}
    with recording() as record:
        y.sum().backward()
    (launch,) = (launch for launch in record.launches if "Rotary" in launch.op)
    assert launch.arguments[3] == 0, "x is given, so the gradients of cos and sin are computed"


# --- that this file sees mistakes -----------------------------------------------------------------


def changed(name, **changes):
    """Has torch_npu's operator called with other arguments than ops/ gives it."""

    def patch(monkeypatch):
        import torch_npu

        genuine = getattr(torch_npu, name)

        def call(*args, **options):
            return genuine(*args, **{**options, **{k: f(options) for k, f in changes.items()}})

        monkeypatch.setattr(torch_npu, name, call)

    return patch


def give(value):
    return lambda options: value


ATTENTION = "npu_fusion_attention"
CACHED = "npu_fused_infer_attention_score"
ERRORS = {
    "no mask": (ATTENTION, {"atten_mask": give(None)}),
    "inverted mask": (ATTENTION, {"atten_mask": lambda options: ~options["atten_mask"]}),
    "no scale": (ATTENTION, {"scale": give(1.0)}),
    "mode 0": (ATTENTION, {"sparse_mode": give(0)}),
    "dropout for its complement": (ATTENTION, {"keep_prob": give(0.1)}),
    "documents not kept apart": (
        ATTENTION,
        {
            "actual_seq_qlen": lambda options: options["actual_seq_qlen"][-1:],
            "actual_seq_kvlen": lambda options: options["actual_seq_kvlen"][-1:],
        },
    ),
    "leading zero": (
        ATTENTION,
        {
            "actual_seq_qlen": lambda options: [0, *options["actual_seq_qlen"]],
            "actual_seq_kvlen": lambda options: [0, *options["actual_seq_kvlen"]],
        },
    ),
    "cache without mask": (CACHED, {"atten_mask": give(None), "sparse_mode": give(0)}),
    "cache from the first key": (CACHED, {"sparse_mode": give(2)}),
    "cache to its capacity": (CACHED, {"actual_seq_lengths_kv": give(None)}),
    "cache without scale": (CACHED, {"scale": give(1.0)}),
    "cache without groups": (CACHED, {"num_key_value_heads": give(0)}),
    "another epsilon": ("npu_rms_norm", {"epsilon": give(1e-2)}),
    "neighbours turned": ("npu_rotary_mul", {"rotary_mode": give("interleave")}),
    "halves of another axis": ("npu_swiglu", {"dim": give(1)}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_wrong_call_is_seen(name, monkeypatch):
    op, changes = ERRORS[name]
    checks = {
        ATTENTION: partial(test_attention, "packed", (14, 2, 64), "float32"),
        CACHED: partial(test_cached_attention, 5, (14, 2, 64), "bfloat16"),
        "npu_rms_norm": partial(test_rms_norm, (3, 1, 3584), "float32"),
        "npu_rotary_mul": partial(test_rotary, (12, 2, 4, 128), False, "float32"),
        "npu_swiglu": partial(test_swiglu, "float32"),
    }
    from npusim.references import InvalidCall

    checks[op]()
    changed(op, **changes)(monkeypatch)
    with pytest.raises((AssertionError, InvalidCall, RuntimeError)):
        checks[op]()


@pytest.mark.parametrize("index", [0, 1], ids=["turned the wrong way", "none"])
def test_a_wrong_gradient_of_rotary_is_seen(index, monkeypatch):
    import torch_npu

    genuine = torch_npu.npu_rotary_mul_backward
    wrong = [
        lambda grad, x, cos, sin: genuine(grad, x, cos, -sin),
        lambda grad, x, cos, sin: genuine(grad * 0, x, cos, sin),
    ]
    monkeypatch.setattr(torch_npu, "npu_rotary_mul_backward", wrong[index])
    with pytest.raises(AssertionError):
        test_rotary((12, 2, 4, 128), False, "float32")
