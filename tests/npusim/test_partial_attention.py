"""Attention over blocks by the fused operators against the plain twin, and put together again.

Tolerances as in test_fused_ops.py: SLACK times the noise of the plain twin.
"""

from __future__ import annotations

import pytest

from model.context_cases import ALGORITHMS, PACKINGS, SCALE, S, error, inputs

pytestmark = pytest.mark.simulated

CP = 4
SLACK = 3


def launches_of(algorithm, packing, rank):
    """The launches of a rank, and the ranks whose keys they are about; None for all keys."""
    from qwen2_ascend.model import context_plan

    b, ends = PACKINGS[packing]
    if algorithm == "megatron_cp_algo":
        launches = context_plan.ring_launches(S, b, CP, rank, ends)
        return [(launch, (rank - n) % CP) for n, launch in enumerate(launches)]
    return [(launch, None) for launch in context_plan.gathered_launches(S, b, CP, rank, ends)]


def computed(ops, tensors, algorithm, packing, rank):
    """The result and the gradients that one rank finds, keys' and values' of whole rows."""
    import torch

    from model.context_cases import own
    from qwen2_ascend.model.context_parallel import _Merged
    from qwen2_ascend.ops.blocks import Gradients

    q, k, v, upstream = tensors
    mine = own(q, CP, rank, algorithm)
    merged = _Merged(mine)
    launches = [x for x in launches_of(algorithm, packing, rank) if x[0]]

    def keys_of(rank):
        return (
            (k, v) if rank is None else (own(k, CP, rank, algorithm), own(v, CP, rank, algorithm))
        )

    for launch, held in launches:
        merged.add(ops.forward(mine, *keys_of(held), launch, softmax_scale=SCALE))
    context = merged.context.to(q.dtype)
    d_context = own(upstream, CP, rank, algorithm).view(context.shape)
    d_q = torch.zeros_like(merged.context)
    whole = [torch.zeros_like(x, dtype=d_q.dtype) for x in (k, v)]
    places = torch.arange(S)
    for launch, held in launches:
        kept = keys_of(held)
        found = Gradients(d_q, *(torch.zeros_like(x, dtype=d_q.dtype) for x in kept))
        statistics = context, merged.lse
        ops.backward(d_context, mine, *kept, *statistics, launch, softmax_scale=SCALE, into=found)
        where = places if held is None else own(places, CP, held, algorithm)
        for total, share in zip(whole, found[1:], strict=True):
            total.index_add_(0, where.to(total.device), share)
    return [context, d_q, *whole]


def assert_as_near_as_the_plain_twin(algorithm, dtype, packing):
    """Compares on rank 1 of 4, which sees keys of ranks before it and after it."""
    import torch

    from qwen2_ascend.ops import get_ops

    plain, fused = (get_ops(name).partial_attention for name in ("torch", "npu"))
    tensors = inputs(PACKINGS[packing][0], getattr(torch, dtype))
    exact = computed(plain, [x.double() for x in tensors], algorithm, packing, 1)
    twin = computed(plain, tensors, algorithm, packing, 1)
    found = computed(fused, [x.npu() for x in tensors], algorithm, packing, 1)
    for one, other, right in zip(found, twin, exact, strict=True):
        limit = max(SLACK * error(other, right), torch.finfo(tensors[0].dtype).eps)
        assert error(one.cpu(), right) <= limit, packing


@pytest.mark.parametrize(
    ("dtype", "packings"),
    [("float32", tuple(PACKINGS)), ("bfloat16", ("dense", "two rows")), ("float16", ("dense",))],
)
@pytest.mark.parametrize("algorithm", ALGORITHMS[:2])
def test_what_a_rank_finds_is_the_plain_twins(algorithm, dtype, packings):
    for packing in packings:
        assert_as_near_as_the_plain_twin(algorithm, dtype, packing)


def given_to_operators(monkeypatch, packing):
    """The names of the options that the calls of a rank's attention, both ways, give by keyword."""
    import torch
    import torch_npu

    from qwen2_ascend.ops import get_ops

    found = []
    for operator in ("npu_fusion_attention", "npu_fusion_attention_grad"):
        genuine = getattr(torch_npu, operator)

        def call(*args, _genuine=genuine, **options):
            found.append(options.keys())
            return _genuine(*args, **options)

        monkeypatch.setattr(torch_npu, operator, call)
    tensors = [x.npu() for x in inputs(PACKINGS[packing][0], torch.float32)]
    for algorithm in ALGORITHMS[:2]:
        computed(get_ops("npu").partial_attention, tensors, algorithm, packing, 1)
    return found


def test_whole_rows_need_no_newer_operator(monkeypatch):
    """What torch_npu takes since 7.2 alone goes with packed documents alone."""
    from qwen2_ascend.ops import npu

    monkeypatch.setattr(npu, "_schema", lambda name: "(Tensor query, int[]? actual_seq_qlen)")
    npu.packed_blocks_faults.cache_clear()
    calls = given_to_operators(monkeypatch, "dense")
    assert calls and all("softmax_layout" not in options for options in calls)
    npu.packed_blocks_faults.cache_clear()


def test_packed_documents_are_refused_by_an_older_operator(monkeypatch):
    """The check at start refuses them, and so does the operator's caller."""
    from qwen2_ascend.errors import UserError
    from qwen2_ascend.ops import npu

    assert npu.packed_blocks_faults() == []
    assert any(
        "softmax_layout" in options for options in given_to_operators(monkeypatch, "two rows")
    )
    monkeypatch.setattr(npu, "_schema", lambda name: "(Tensor query, int[]? actual_seq_qlen)")
    npu.packed_blocks_faults.cache_clear()
    with pytest.raises(UserError, match=r"8\.3\.RC1 or later, or use --context-parallel-algo"):
        given_to_operators(monkeypatch, "two rows")
    assert faults_at_start("--reset-attention-mask") == npu.packed_blocks_faults() != []
    assert faults_at_start("") == []
    assert faults_at_start("--reset-attention-mask --attention-backend unfused") == []
    assert faults_at_start("--reset-attention-mask --context-parallel-algo ulysses_cp_algo") == []
    npu.packed_blocks_faults.cache_clear()


def faults_at_start(flags):
    from qwen2_ascend.training.settings import parse
    from qwen2_ascend.training.start import _packed_blocks_faults

    needed = "--config 7B --data-path x --seq-length 32 --lr 1e-5 --train-iters 3"
    settings = parse(f"{needed} --context-parallel-size 2 {flags}".split())
    return _packed_blocks_faults(settings, settings.layout(), "npu")


MISTAKES = {
    "a diagonal from the first key": ("npu_fusion_attention", {"sparse_mode": 2}, 1),
    "no mask": ("npu_fusion_attention", {"atten_mask": None}, 0),
    "no mask in backward": ("npu_fusion_attention_grad", {"atten_mask": None}, 0),
    "statistics head by head": ("npu_fusion_attention", {"softmax_layout": ""}, 0),
    "statistics head by head in backward": (
        "npu_fusion_attention_grad",
        {"softmax_layout": ""},
        0,
    ),
    "no scale in backward": ("npu_fusion_attention_grad", {"scale_value": 1.0}, 0),
}
"""The operator, what it gets instead, and the algorithm that shows it."""


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_seen(name, monkeypatch):
    import torch_npu

    operator, wrong, number = MISTAKES[name]
    genuine = getattr(torch_npu, operator)

    def call(*args, **options):
        return genuine(*args, **{**options, **wrong})

    monkeypatch.setattr(torch_npu, operator, call)
    with pytest.raises(AssertionError):
        assert_as_near_as_the_plain_twin(ALGORITHMS[number], "float32", "two rows")
