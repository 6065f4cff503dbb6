"""torch_npu's fused products and exchanges: the operators, layers of them, whole runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from npusim.products import CASES, FUSED, GOLDEN, SEQUENCE_PARALLEL, WAYS, WIDE, measure, table

BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks.md"
COC_NOISE = 1e-3
"""Noise of losses about 6 and, relative, of gradient norms and a layer's tensors, in bf16, whose
numbers are rounded by 4e-3 each. Nothing was measured to differ where this was written; a CPU may
have another kernel for a piece's few rows."""


def golden():
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


on_cards = pytest.mark.parametrize(
    "ranks", [pytest.param(n, marks=pytest.mark.simulated(cards=n)) for n in (2, 4)], indirect=True
)


def parts_of(ranks, rows, columns, seed):
    """Every rank's matrix, and this one's, on the card."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(ranks.size, rows, columns, generator=generator).bfloat16()
    return parts, parts[ranks.rank].npu()


def named(ranks):
    from qwen2_ascend.runtime.communicator import hccl_name

    return hccl_name(ranks.hccl)


@on_cards
@pytest.mark.parametrize("transposed", [False, True])
def test_gathered_product(ranks, transposed):
    import torch
    import torch_npu

    parts, own = parts_of(ranks, 8, 256, seed=1)
    w = torch.randn(256, 24, generator=torch.Generator().manual_seed(2)).bfloat16()
    on_card = w.t().contiguous().npu().t() if transposed else w.npu()
    name = named(ranks)
    output, total = torch_npu.npu_all_gather_base_mm(own, on_card, name, ranks.size)
    assert torch.equal(total.cpu(), parts.flatten(0, 1))
    expected = parts.flatten(0, 1).float() @ w.float()
    torch.testing.assert_close(output.cpu().float(), expected, rtol=5e-3, atol=1e-2)


@on_cards
def test_summed_product(ranks):
    import torch
    import torch_npu

    parts, own = parts_of(ranks, 8 * ranks.size, 256, seed=3)
    w = torch.randn(256, 24, generator=torch.Generator().manual_seed(4)).bfloat16()
    output = torch_npu.npu_mm_reduce_scatter_base(own, w.npu(), named(ranks), ranks.size)
    expected = (parts.float() @ w.float()).sum(0).chunk(ranks.size)[ranks.rank]
    # each rank's product is rounded to bf16, and so is each partial sum
    torch.testing.assert_close(output.cpu().float(), expected, rtol=2e-2, atol=0.5)


@pytest.mark.simulated(cards=2)
def test_references_refuse_what_the_documents_rule_out(ranks):
    import torch
    import torch_npu

    from npusim.references import InvalidCall

    name = named(ranks)
    x, w = torch.ones(4, 256).bfloat16().npu(), torch.ones(256, 8).bfloat16().npu()
    gathered, scattered = torch_npu.npu_all_gather_base_mm, torch_npu.npu_mm_reduce_scatter_base
    bias = torch.ones(8).bfloat16().npu()
    for operator, arguments, options in (
        (gathered, (x[:, :128].contiguous(), w[:128], name, 2), {}),
        (scattered, (x[:, :128].contiguous(), w[:128], name, 2), {}),
        (gathered, (x.float(), w.float(), name, 2), {}),
        (gathered, (x, w, name, 2), {"bias": bias}),
        (scattered, (x[:3], w, name, 2), {}),
    ):
        with pytest.raises((InvalidCall, RuntimeError)):
            operator(*arguments, **options)


# --- layers --------------------------------------------------------------------------------------

layers = pytest.mark.parametrize(
    ("cut", "way"),
    [
        pytest.param(
            cut, way, marks=pytest.mark.simulated(cards=2, alone="products"), id=f"{cut}-{n}"
        )
        for cut, way in CASES
        for n in [list(WAYS).index(way)]
    ],
)


@pytest.mark.filterwarnings("default")
@layers
def test_a_layer_launches_and_exchanges_what_it_did(cut, way, run, simulator):
    """Otherwise look at the difference, then `python -m npusim.products --write`."""
    assert measure(run.runtime, simulator, cut, way) == golden()[f"{cut} | {way}"]


def test_fused_operators_take_the_place_of_products_and_exchanges():
    """With sequence parallelism forward exchanges nothing by itself, backward the column-parallel
    layers' inputs and their gradients, whose products are hidden by each other."""
    fused = (
        ["aclnnAllGatherMatmul", "aclnnMatmulReduceScatter"] * 2,
        ["aclnnAllGatherMatmul"] * 2,
    )
    mc2, whole = golden()["TP2 SP | `--use-ascend-mc2`"], golden()["TP2 SP | whole"]
    assert (mc2["forward"]["fused"], mc2["backward"]["fused"]) == fused
    for part, ours in zip(("forward", "backward"), fused, strict=True):
        assert mc2[part]["exchanges"] == whole[part]["exchanges"] - len(ours)
        assert mc2[part]["launches"] <= whole[part]["launches"]


@pytest.mark.filterwarnings("default")
@pytest.mark.simulated(cards=2, alone="products")
def test_without_sequence_parallelism_there_is_no_fused_product(run):
    """This is for callers of `build_model`; training refuses it at start."""
    from helpers import tiny_config
    from model.overlap_worker import tensors_of
    from qwen2_ascend.errors import UserError

    options = {"frozen": False, "config": tiny_config(**WIDE), "dtype": "bf16", "backend": "npu"}
    with pytest.raises(UserError, match="needs sequence_parallel=True"):
        tensors_of(run, False, **options, use_ascend_mc2=True)


def test_the_table_is_that_of_the_document():
    assert table(golden()) in BENCHMARKS.read_text(encoding="utf-8")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("frozen", [False, True])
@layers
def test_a_layer_computes_what_a_whole_one_does(cut, way, frozen, run, record_property):
    """The output and every gradient, biases and norms too; frozen weights as under LoRA."""
    from helpers import tiny_config
    from model.overlap_worker import tensors_of
    from npusim.simulator import recording

    options = {"frozen": frozen, "config": tiny_config(**WIDE), "dtype": "bf16", "backend": "npu"}
    whole = tensors_of(run, SEQUENCE_PARALLEL[cut], **options)
    with recording() as record:
        found = tensors_of(run, SEQUENCE_PARALLEL[cut], **options, **WAYS[way])
    fused = [op for op in record.ops if op in FUSED]
    assert len(fused) == (expected_fused(frozen) if "mc2" in way else 0)
    assert whole.keys() == found.keys()
    off = {}
    for name, tensor in whole.items():
        a, b = tensor.cpu().float(), found[name].cpu().float()
        off[name] = ((a - b).abs().max() / a.abs().max()).item()
    record_property("off", f"{max(off.values()):.1e}")
    assert max(off.values()) <= allowed(way), off


def allowed(way):
    """Fused operators are simulated by the very products and sums that they replace."""
    return 0 if "mc2" in way else COC_NOISE


def expected_fused(frozen):
    """Fused operators of a layer, forward and backward.

    Frozen weights leave nothing to hide the inputs' gradients, which are then fused too.
    """
    return 4 + 2 + (2 if frozen else 0)


# --- whole runs ----------------------------------------------------------------------------------

TP2 = "--tensor-model-parallel-size 2"
RECOMPUTED = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
MC2, COC = "--use-ascend-mc2", "--use-ascend-coc --coc-parallel-num 4"
RUNS = {
    "tp2-sp": f"{TP2} --sequence-parallel",
    "tp2": TP2,
    "tp2-sp-recompute": f"{TP2} --sequence-parallel {RECOMPUTED}",
    "tp2-sp-outputs-swap": (
        f"{TP2} --sequence-parallel --recompute-activation-function --recompute-norm "
        "--swap-attention"
    ),
}


def wide_model(run):
    import torch

    from helpers import make_tiny_hugging_face_folder, tiny_config

    folder = run.folder / "wide"
    if run.runtime.rank == 0 and not folder.exists():
        make_tiny_hugging_face_folder(folder, tiny_config(**WIDE))
    torch.distributed.barrier()
    return folder


def results_of(run, flags):
    from distributed.train_worker import FLAGS, STEPS, start, steps

    flags = f"{FLAGS.replace('--device cpu', '--device npu')} --bf16 {flags}"
    return steps(start(run, flags, load=wide_model(run)), STEPS)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("flags", "more"),
    [
        pytest.param(
            flags, more, marks=pytest.mark.simulated(cards=2, alone="products"), id=f"{name}-{way}"
        )
        for name, flags in RUNS.items()
        for way, more in (("mc2", MC2), ("coc", COC))
        if more == COC or "--sequence-parallel" in flags
    ],
)
def test_losses_are_those_of_whole_products(flags, more, run, record_property):
    """Four optimizer steps in bf16."""
    from npusim.simulator import recording

    whole = results_of(run, flags)
    with recording() as record:
        found = results_of(run, f"{flags} {more}")
    fused = set(record.ops) & FUSED
    assert bool(fused) == (more == MC2)
    off = max(abs(a.loss - b.loss) for a, b in zip(whole, found, strict=True))
    norms = max(abs(a.grad_norm / b.grad_norm - 1) for a, b in zip(whole, found, strict=True))
    record_property("off", f"{off:.1e} {norms:.1e}")
    assert max(off, norms) <= allowed(more), (off, norms)
