"""The simulated operators' references against CANN's own Python models of its operators.

They need checkouts, see cann_referee.py and the README, and skip without. Both sides compute in
fp32 from the same fp32 inputs, so they differ by roundings of sums only: at most 1.0e-6 of the
largest number was seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from npusim.cann_referee import checkouts, model
from npusim.references import NPU_REFERENCES, by_sequence, kept_weights

TOLERANCE = 4e-6
ATTENTION = "attention/flash_attention_score/tests/pytest/cpu_impl.py"
ATTENTION_GRAD = "attention/flash_attention_score_grad/tests/pytest/cpu_impl.py"
HEADS = [(4, 4, 32), (6, 2, 64), (14, 2, 64), (7, 1, 128)]
"""np, ng, hn."""
LAYOUTS = ["SBH", "BSND", "BSH", "BNSD"]

heads = pytest.mark.parametrize("heads", HEADS, ids=lambda h: f"{h[0]}-{h[1]}-{h[2]}")
layouts = pytest.mark.parametrize("layout", LAYOUTS)
dropouts = pytest.mark.parametrize("keep_prob", [1.0, 0.9, 0.6])


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture(scope="module")
def differences() -> Iterator[dict[str, float]]:
    """The largest difference of each test; printed at the end, which -s shows."""
    found: dict[str, float] = {}
    yield found
    for name, difference in found.items():
        print(f"\n{name}: {difference:.1e}", end="")


@pytest.fixture
def worst(request: pytest.FixtureRequest, differences: dict[str, float]) -> Callable[[float], None]:
    """Takes a difference that this test has seen."""
    checkouts()  # before anything is computed
    name = request.node.originalname

    def seen(difference: float) -> None:
        differences[name] = max(difference, differences.get(name, 0.0))

    return seen


def assert_close(found: torch.Tensor, theirs: torch.Tensor | np.ndarray, worst) -> None:
    """`found` is `theirs` up to TOLERANCE of the largest number."""
    theirs = torch.as_tensor(np.asarray(theirs)).double()
    assert found.shape == theirs.shape
    difference = ((found.double() - theirs).abs().max() / theirs.abs().max()).item()
    worst(difference)
    assert difference <= TOLERANCE


# --- attention ------------------------------------------------------------------------------------


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """`x`, `[b, n, s, hn]`, in the layout."""
    if layout == "BNSD":
        return x
    if layout == "SBH":
        return x.permute(2, 0, 1, 3).flatten(2)
    if layout == "TND":
        return x[0].transpose(0, 1)
    return x.transpose(1, 2) if layout == "BSND" else x.transpose(1, 2).flatten(2)


def inputs_of(heads: tuple[int, int, int], b: int, sq: int, sk: int) -> list[torch.Tensor]:
    """q, k, v and the gradient of the result, each `[b, n, s, hn]`."""
    num_heads, groups, width = heads
    shapes = ((num_heads, sq), (groups, sk), (groups, sk), (num_heads, sq))
    return [randn(b, n, s, width, seed=i) for i, (n, s) in enumerate(shapes)]


def ours(heads, layout, inputs, *, sparse_mode, keep_prob, ends=(None, None), **options):
    """Forward and backward of the references: context, maximum, sum, dq, dk, dv."""
    num_heads, _, width = heads
    q, k, v, d = (laid_out(x, layout) for x in inputs)
    compressed = torch.ones(2048, 2048).triu(1).bool()
    call = {
        "query": q,
        "key": k,
        "value": v,
        "head_num": num_heads,
        "input_layout": layout,
        "atten_mask": compressed if sparse_mode else None,
        "pre_tockens": 2**31 - 1,
        "next_tockens": 2**31 - 1,
        "sparse_mode": sparse_mode,
        "inner_precise": 0,
        "actual_seq_qlen": ends[0],
        "actual_seq_kvlen": ends[1],
        "keep_prob": keep_prob,
        **options,
    }
    b, sq = inputs[0].shape[0], inputs[0].shape[2]
    rows = (sq, num_heads, 8) if layout == "TND" else (b, num_heads, sq, 8)
    scale, seed, offset = width**-0.5, 1234 * 2**32 + 77, 48
    outputs = [torch.empty_like(q), torch.empty(rows), torch.empty(rows), None, seed, offset, 0]
    context, largest, total = NPU_REFERENCES["npu_fusion_attention"](outputs, scale=scale, **call)
    gradients = NPU_REFERENCES["npu_fusion_attention_grad"](
        None,
        dy=d,
        softmax_max=largest,
        softmax_sum=total,
        attention_in=context,
        scale_value=scale,
        seed=seed,
        offset=offset,
        **call,
    )
    return context, largest, total, *gradients


def theirs_forward(heads, inputs, sparse_mode, keep_prob, **options):
    num_heads, groups, width = heads
    forward = model(ATTENTION, "test_utils")
    q, k, v, _ = inputs
    return forward.tforward(
        *(q, k, v, None),
        B=q.shape[0],
        N1=num_heads,
        N2=groups,
        Sq=q.shape[2],
        Skv=k.shape[2],
        D=width,
        sparse_mode=sparse_mode or None,
        keep_prob=keep_prob,
        seed=1234 * 2**32 + 77,
        offset=48,
        **options,
    )


def theirs_backward(heads, inputs, hidden, kept, keep_prob):
    """dq, dk, dv of their model: `[b, n, s, hn]`.

    Args:
        heads: np, ng, hn.
        inputs: q, k, v and the gradient of the result.
        hidden: where a query must not look, or None.
        kept: what dropout leaves, `[b, np, sq, sk]`, or a one.
        keep_prob: the share.
    """
    num_heads, groups, width = heads
    their = model(ATTENTION_GRAD, "common")
    q, d = (x.unflatten(1, (groups, num_heads // groups)) for x in (inputs[0], inputs[3]))
    k, v = (x.unsqueeze(2) for x in inputs[1:3])
    (b, _, sq, _), sk = inputs[0].shape, inputs[1].shape[2]
    case = {"dtype": "fp32", "B": b, "N1": num_heads, "N2": groups, "S1": sq, "S2": sk}
    case |= {"D": width, "D_V": width, "input_layout": "BNSD"}
    scale, one, zero = width**-0.5, torch.tensor(1.0), torch.tensor(0.0)
    if kept.dim():
        kept = kept.unflatten(1, (groups, num_heads // groups))
    common = (kept.float(), zero, scale, keep_prob)
    _, weights, *_ = their.tforward(
        *(case, q, k, v, kept.float(), hidden, zero, scale, keep_prob),
        *(False, 1, one, one, one),
    )
    found = their.tbackward(case, d, q, k, v, weights, one, *common, one, one, one, one)
    return [x.flatten(1, 2) for x in found[:3]]


def kept_of(heads, b, sq, sk, keep_prob):
    """Their mask of what dropout leaves."""
    their = model(ATTENTION, "test_utils")
    mask = their.gen_dropmask(b, heads[0], sq, sk, keep_prob, 1234 * 2**32 + 77, 48)
    return mask.view(b, heads[0], sq, sk)


@dropouts
@layouts
@heads
@pytest.mark.parametrize("mode", [0, 2, 3])
def test_attention_of_whole_sequences(mode, heads, layout, keep_prob, worst):
    """Mode 0 is used without a mask, for the pieces of a shared sequence that see all keys."""
    b, s = 2, 40
    inputs = inputs_of(heads, b, s, s)
    found = ours(heads, layout, inputs, sparse_mode=mode, keep_prob=keep_prob)
    context, largest, total = theirs_forward(heads, inputs, mode, keep_prob, input_layout=layout)
    assert_close(found[0], laid_out(context, layout), worst)
    assert_close(found[1], largest, worst)
    assert_close(found[2], total, worst)
    hidden = torch.ones(s, s).triu(1).bool() if mode else None
    kept = kept_of(heads, b, s, s, keep_prob) if keep_prob < 1 else torch.tensor(1.0)
    expected = theirs_backward(heads, inputs, hidden, kept, keep_prob)
    for own, right in zip(found[3:], expected, strict=True):
        assert_close(own, laid_out(right, layout), worst)


@dropouts
@heads
def test_attention_to_more_keys_than_queries(heads, keep_prob, worst):
    """Ranks share pieces of a sequence like this: mode 3, whose diagonal ends at the last key."""
    inputs = inputs_of(heads, 2, 24, 56)
    found = ours(heads, "SBH", inputs, sparse_mode=3, keep_prob=keep_prob)
    context, *_ = theirs_forward(heads, inputs, 3, keep_prob, input_layout="SBH")
    assert_close(found[0], laid_out(context, "SBH"), worst)
    hidden = torch.ones(24, 56).triu(56 - 24 + 1).bool()
    kept = kept_of(heads, 2, 24, 56, keep_prob) if keep_prob < 1 else torch.tensor(1.0)
    expected = theirs_backward(heads, inputs, hidden, kept, keep_prob)
    for own, right in zip(found[3:], expected, strict=True):
        assert_close(own, laid_out(right, "SBH"), worst)


@dropouts
@heads
@pytest.mark.parametrize("mode", [0, 2, 3])
def test_attention_of_packed_documents(mode, heads, keep_prob, worst):
    """Their statistics come head by head within each document, which is the operator's default."""
    query_ends, key_ends = [5, 21, 40], ([5, 21, 40] if mode == 2 else [9, 41, 60])
    inputs = inputs_of(heads, 1, query_ends[-1], key_ends[-1])
    ends = (query_ends, key_ends)
    found = ours(heads, "TND", inputs, sparse_mode=mode, keep_prob=keep_prob, ends=ends)
    context, largest, total = theirs_forward(
        *(heads, inputs, mode, keep_prob),
        input_layout="TND",
        actual_seq_qlen=query_ends.copy(),
        actual_seq_kvlen=key_ends.copy(),
    )
    assert_close(found[0], laid_out(context, "TND"), worst)
    assert_close(found[1].flatten(), largest, worst)
    assert_close(found[2].flatten(), total, worst)


@heads
def test_statistics_of_packed_documents_token_by_token(heads, worst):
    """With softmax_layout="TND" the same numbers lie token by token; the gradient takes them."""
    ends = ([5, 21, 40],) * 2
    inputs = inputs_of(heads, 1, 40, 40)
    plain = ours(heads, "TND", inputs, sparse_mode=2, keep_prob=1.0, ends=ends)
    token = ours(
        heads, "TND", inputs, sparse_mode=2, keep_prob=1.0, ends=ends, softmax_layout="TND"
    )
    _, largest, _ = theirs_forward(
        *(heads, inputs, 2, 1.0),
        input_layout="TND",
        actual_seq_qlen=ends[0].copy(),
        actual_seq_kvlen=ends[1].copy(),
    )
    rows = torch.as_tensor(largest).view(-1, 8)
    bounds = [0, *ends[0]]
    by_document = [
        rows[a * heads[0] : b * heads[0]].unflatten(0, (heads[0], -1)).transpose(0, 1)
        for a, b in zip(bounds, ends[0], strict=False)
    ]
    assert_close(token[1], torch.cat(by_document), worst)
    for own, right in zip(token[3:], plain[3:], strict=True):
        assert torch.equal(own, right)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@heads
@pytest.mark.parametrize("keep_prob", [0.9, 0.6])
def test_gradient_of_each_document(keep_prob, heads, packed, worst):
    """Their model takes one packed document at a time; so do we here."""
    lengths = (16, 24) if packed else (40,)
    ends = np.cumsum(lengths).tolist()
    inputs = inputs_of(heads, 1, 40, 40)
    found = ours(heads, "TND", inputs, sparse_mode=2, keep_prob=keep_prob, ends=(ends, ends))
    start = drawn = 0
    for index, length in enumerate(lengths):
        part = [x[:, :, start : start + length] for x in inputs]
        columns = -(-length // 16) * 16
        count = heads[0] * length * columns
        their = model(ATTENTION, "test_utils")
        bits = their.gen_dropmask_tnd(drawn + count, keep_prob, 1234 * 2**32 + 77, 48)[drawn:]
        kept = bits[:count].view(1, heads[0], length, columns)[..., :length]
        hidden = torch.ones(length, length).triu(1).bool()
        expected = theirs_backward(heads, part, hidden, kept, keep_prob)
        for own, right in zip(found[3:], expected, strict=True):
            sequences = by_sequence(own, "TND", 0, ends)
            assert_close(sequences[index], right[0], worst)
        start, drawn = start + length, drawn + count


@pytest.mark.parametrize("keep_prob", [0.999, 0.9, 0.5, 0.1])
@pytest.mark.parametrize("seed", [0, 2, 2**32 + 5, 2**63 - 1])
@pytest.mark.parametrize("offset", [0, 10, 4096])
def test_dropout_draws_the_same_bits(offset, seed, keep_prob):
    their = model(ATTENTION, "test_utils").gen_dropmask_tnd(4096, keep_prob, seed, offset)
    found = kept_weights(seed, offset, 0, 4096, keep_prob)
    assert torch.equal(found, their.bool())
    later = kept_weights(seed, offset, 1024, 3072, keep_prob)
    assert torch.equal(later, their.bool()[1024:])


@pytest.mark.parametrize("keep_prob", [0.9, 0.5])
def test_what_dropout_leaves_is_a_share_of_256(keep_prob):
    """A share of 0.9 leaves 230 of 256 weights, 0.8984: what is kept is scaled by 1 / 0.9 still."""
    found = kept_weights(7, 0, 0, 2**20, keep_prob).double().mean().item()
    share = (math.floor(keep_prob * 255) + 1) / 256
    assert abs(found - share) < 4 * (share * (1 - share) / 2**20) ** 0.5


# --- attention over a cache -----------------------------------------------------------------------

INFERENCE = "attention/fused_infer_attention_score/tests/"
PAGED = INFERENCE + "pytest/gqa_no_quant_bnsd_bsnd.py"
STEPS = INFERENCE + "st/aclnnFusedInferAttentionScoreV4/executor_aclnnFusedInferAttentionScoreV4.py"
HARNESS = ("configs.dataset_config", "configs.results_config", "tasks.api_execute")
HARNESS += ("tasks.api_execute.base_api", "tasks.api_execute.aclnn_base_api")
HARNESS += ("tasks.backends.lib_interface.acl_wrapper",)
LENGTHS, CAPACITY = [7, 40, 23], 40

dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def over_a_cache(heads, new_tokens, dtype):
    """q, keys, values, each `[b, n, s, hn]`, and the reference's context and log-sum-exp, fp32."""
    num_heads, groups, width = heads
    shapes = ((num_heads, new_tokens), (groups, CAPACITY), (groups, CAPACITY))
    inputs = [randn(len(LENGTHS), n, s, width, seed=i).to(dtype) for i, (n, s) in enumerate(shapes)]
    alone = new_tokens == 1  # as ops/npu.py calls it
    query = inputs[0]
    found = NPU_REFERENCES["npu_fused_infer_attention_score"](
        [torch.empty(query.shape), torch.empty(*query.shape[:3], 1)],
        **dict(zip(("query", "key", "value"), inputs, strict=True)),
        atten_mask=None if alone else torch.ones(2048, 2048).triu(1).bool(),
        num_heads=num_heads,
        num_key_value_heads=groups,
        scale=width**-0.5,
        input_layout="BNSD",
        sparse_mode=0 if alone else 3,
        pre_tokens=2**31 - 1,
        next_tokens=2**31 - 1,
        inner_precise=0,
        actual_seq_lengths=None,
        actual_seq_lengths_kv=LENGTHS,
        softmax_lse_flag=True,
    )
    return [x.float() for x in inputs], *found


@dtypes
@heads
@pytest.mark.parametrize("new_tokens", [1, 5], ids=["decode", "prefill"])
def test_attention_over_a_cache(new_tokens, heads, dtype, worst):
    """A prompt's diagonal ends at each sequence's length, not at the cache's."""
    inputs, context, log_sum = over_a_cache(heads, new_tokens, dtype)
    unused = ("tensorflow", "ml_dtypes", *(f"atk.{name}" for name in HARNESS))
    their = model(STEPS, unused=unused)
    (num_heads, groups, width), b = heads, len(LENGTHS)
    query, key, value = (x.numpy() for x in inputs)
    key, value = (their._t_broadcastKV_sigle(num_heads, groups, x, None)[0] for x in (key, value))
    masks, _ = their._create_mask_right_down(
        *((new_tokens, CAPACITY), 2**31 - 1, 0, [], LENGTHS, 0, 0, b, num_heads, [CAPACITY], bool)
    )
    case = {"qs_begin": 0, "qs_end": new_tokens, "kvs_begin": 0, "sparse": 3}
    case |= {"q_dtype": np.float32, "lseflag": True}  # their weights are not rounded either
    for index, (length, mask) in enumerate(zip(LENGTHS, masks, strict=True)):
        hidden = np.broadcast_to(mask, (1, num_heads, *mask.shape)) if new_tokens > 1 else None
        rows = slice(index, index + 1)
        theirs = their._np_pfaattention_act(
            *(query[rows], key[rows], value[rows], None, hidden, width**-0.5),
            *(None, None, 0, 0, case | {"kvs_end": length}),
            out_dtype=None,
        )
        assert_close(context[rows], theirs[0], worst)
        assert_close(log_sum[rows], theirs[1], worst)


@dtypes
@heads
def test_one_token_over_pages(heads, dtype, worst):
    """Their other model has the cache in pages; here each sequence's cache is one page."""
    inputs, context, _ = over_a_cache(heads, 1, dtype)
    their = model(PAGED, unused=("test", "check_valid_param"))
    b, (num_heads, groups, width) = len(LENGTHS), heads
    theirs = their.GeneralizedGQA(
        *(b, num_heads, groups, 1, CAPACITY, width, torch.float32, "BNSD"),
        *([1] * b, LENGTHS, width**-0.5, CAPACITY, "BNBD"),
    )
    pages = torch.arange(b).unsqueeze(1)
    assert_close(context, theirs.forward(*inputs, pages), worst)


# --- norm, rotary, SwiGLU, AdamW, loss ------------------------------------------------------------

NORM, NORM_GRAD = (
    "norm/rms_norm/tests/assets/golden.py",
    "norm/rms_norm_grad/tests/assets/golden.py",
)
SWIGLU = "activation/swi_glu/tests/assets/golden.py"
SWIGLU_GRAD = "activation/swi_glu_grad/tests/assets/golden.py"
ROTARY_GRAD = "posembedding/inplace_partial_rotary_mul_grad/tests/assets/golden.py"
ADAMW = "optim/apply_adam_w/tests/assets/golden.py"
LOSS_GRAD = "loss/cross_entropy_loss_grad/tests/assets/golden.py"


@pytest.mark.parametrize("width", [64, 896, 3584])
def test_rms_norm(width, worst):
    x, dy, gamma = randn(6, 2, width), randn(6, 2, width, seed=1), 1 + 0.3 * randn(width)
    result, rstd = NPU_REFERENCES["npu_rms_norm"](None, input=x, gamma=gamma, epsilon=1e-6)
    theirs = model(NORM).rms_norm_golden(x.numpy(), gamma.numpy(), epsilon=1e-6)
    assert_close(result, theirs[0], worst)
    assert_close(rstd, theirs[1], worst)
    # their model of the gradient takes bf16 alone, and gives fp32
    bf16 = pytest.importorskip("ml_dtypes").bfloat16
    rounded = [tensor.bfloat16().float() for tensor in (dy, x, gamma)]
    call = dict(zip(("dy", "input", "gamma"), rounded, strict=True))
    found = NPU_REFERENCES["npu_rms_norm_backward"](None, **call, rstd=rstd)
    own_dy, own_x, own_gamma = (tensor.numpy().astype(bf16) for tensor in rounded)
    theirs = model(NORM_GRAD).rms_norm_grad_golden(own_dy, own_x, rstd.numpy(), own_gamma)
    assert_close(found[0].flatten(0, 1), theirs[0], worst)
    assert_close(found[1], theirs[1], worst)


@pytest.mark.parametrize("width", [64, 9728])
def test_swiglu(width, worst):
    x, d = 3 * randn(7, 3, width), randn(7, 3, width // 2)
    found = NPU_REFERENCES["npu_swiglu"](None, input=x, dim=-1)
    assert_close(found, model(SWIGLU).swi_glu_golden(x.numpy()), worst)
    gradient = NPU_REFERENCES["npu_swiglu_backward"](None, grad_output=d, input=x, dim=-1)
    theirs = model(SWIGLU_GRAD).swi_glu_grad_golden(d.numpy(), x.numpy(), dim=-1)
    assert_close(gradient, theirs, worst)


@pytest.mark.parametrize("width", [64, 128])
def test_rotary(width, worst):
    """They have a model of the interleaved mode's gradient only.

    The halves are its columns in another order, and forward is the gradient of the inverse turn.
    """
    x, angles = randn(12, 2, 4, width), 3 * randn(12, 1, 1, width // 2)
    halves = torch.cat((angles, angles), -1)
    call = {"r1": halves.cos(), "r2": halves.sin(), "rotary_mode": "half"}
    columns = [*range(0, width, 2), *range(1, width, 2)]
    paired, pairs = torch.empty_like(x), angles.repeat_interleave(2, -1)
    paired[..., columns] = x
    result = NPU_REFERENCES["npu_rotary_mul"](None, input=x, rotate=None, **call)
    gradient = NPU_REFERENCES["npu_rotary_mul_backward"](None, grad=x, input=x, **call)[0]
    turn = model(ROTARY_GRAD).InplacePartialRotaryMulGrad
    for own, sign in ((gradient, 1), (result, -1)):
        tables = (pairs.cos().numpy(), sign * pairs.sin().numpy())
        theirs = turn(paired.numpy(), *tables, rotary_mode=1, partial_slice=(0, width))
        assert_close(own, theirs[..., columns], worst)


@pytest.mark.parametrize("step", [1, 2, 100])
def test_adamw(step, worst):
    """What a card computes for torch's fused AdamW against torch's own update of a tensor.

    The simulated device has no reference for aclnnApplyAdamWV2: it takes torch's.
    """
    weight, grad, first, second = (randn(65, seed=i) for i in range(4))
    second = second.square()
    numbers = {"lr": 1e-2, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8}
    powers = {f"beta{i}_power": numbers[f"beta{i}"] ** (step - 1) for i in (1, 2)}
    scalars = {name: np.float32(value) for name, value in (numbers | powers).items()}
    state = (weight.numpy(), first.numpy(), second.numpy())
    expected = model(ADAMW).apply_adam_w_golden(*state, grad=grad.numpy(), **scalars)
    torch.optim._functional.adamw(  # pyright: ignore[reportPrivateImportUsage]
        *([weight], [grad], [first], [second], [], [torch.tensor(float(step - 1))]),
        amsgrad=False, beta1=0.9, beta2=0.95, lr=1e-2, weight_decay=0.1, eps=1e-8, maximize=False,
    )  # fmt: skip
    for own, right in zip((weight, first, second), expected, strict=True):
        assert_close(own, right, worst)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_cross_entropy_gradient(reduction, worst):
    """It is that of the loss our layers compute on one rank, from its log-probabilities."""
    logits, targets = 3 * randn(12, 97), torch.arange(12) * 5 % 97
    leaf = logits.clone().requires_grad_()
    upstream = randn(12) if reduction == "none" else torch.tensor(0.7)
    loss = torch.nn.functional.cross_entropy(leaf, targets, reduction=reduction)
    loss.backward(upstream)
    theirs = model(LOSS_GRAD).cross_entropy_loss_grad_golden(
        upstream.numpy(), logits.log_softmax(-1).numpy(), targets.numpy(), reduction=reduction
    )
    assert leaf.grad is not None
    assert_close(leaf.grad, theirs, worst)


# --- products and exchanges -----------------------------------------------------------------------

GATHER = "mc2/all_gather_matmul/tests/assets/golden.py"
SCATTER = "mc2/matmul_reduce_scatter/tests/assets/golden.py"
SUM = "mc2/matmul_all_reduce/tests/assets/golden.py"


class Ranks:
    """A stand-in for torch.distributed that has every rank's part of a sum."""

    def __init__(self, others: list[torch.Tensor], rank: int) -> None:
        self._others, self._rank = others, rank

    def _reduce_scatter_base(self, output: torch.Tensor, own: torch.Tensor, op: object) -> None:
        total = sum(self._others, own)
        output.copy_(total.chunk(len(self._others) + 1)[self._rank])


def test_products_with_exchanges(worst):
    """Their models of one rank: which rows are gathered, multiplied, summed and kept.

    `test_fused_products.py` holds the simulated operators to the same products, on cards.
    """
    x, w = [randn(8, 256, seed=i) for i in range(2)], randn(256, 12)
    gathered, total = model(GATHER).all_gather_matmul_golden(x[0], w, rank_size=2)
    assert torch.equal(total, torch.cat([x[0]] * 2))  # of one process: everyone has the same
    assert_close(total @ w, gathered, worst)
    own, other = x[0] @ w, x[1] @ w
    for rank in range(2):
        kept = model(SCATTER).matmul_reduce_scatter_golden(
            x[0], w, rank_size=2, dist=Ranks([other], rank)
        )
        assert_close((own + other).chunk(2)[rank], kept, worst)
    assert_close(own, model(SUM).matmul_all_reduce_golden(x[0], w.t(), is_trans_b=True),
                 worst)  # fmt: skip
