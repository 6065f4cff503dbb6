"""The operators of a layer are those of the golden files; what fusing saves is as documented."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from npusim.env import SOC_910B, SOC_910C
from npusim.launches import (
    LAYERS,
    golden,
    host_code,
    layer_launches,
    layer_table,
    step_launches,
)

BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks.md"
FUSED = {
    "attention": "aclnnFlashAttentionScore",
    "rms_norm": "aclnnRmsNorm",
    "rotary": "aclnnRotaryPositionEmbeddingV2",
    "swiglu": "aclnnSwiGlu",
}


@pytest.fixture(scope="module")
def runtime():
    from qwen2_ascend import runtime as runtimes

    running = runtimes.start("npu")
    yield running
    running.close()


def on(*chips: str):
    marks = [pytest.param(c, marks=pytest.mark.simulated(soc=c, alone="launches")) for c in chips]
    return pytest.mark.parametrize("chip", marks)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("layer", LAYERS)
@on(SOC_910B, SOC_910C)
def test_a_layer_launches_what_it_did(chip, layer, runtime, simulator):
    """Otherwise look at the difference, then `python -m npusim.launches --write`."""
    assert layer_launches(runtime, simulator, **LAYERS[layer]) == golden(chip)[layer]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", FUSED)
@on(SOC_910B)
def test_a_switch_takes_one_operator_and_its_gradient_away(chip, name, runtime, simulator):
    """The others stay fused."""
    found = layer_launches(runtime, simulator, backend="npu", plain=(name,))
    launched = set(found["forward"])
    assert {key for key, op in FUSED.items() if op not in launched} == {name}
    gradients = [op for op in found["backward"] if op.startswith(FUSED[name].removesuffix("V2"))]
    assert not gradients


@pytest.mark.filterwarnings("default")
@on(SOC_910B)
def test_both_specs_have_the_same_weights(chip, runtime, simulator):
    from helpers import tiny_config
    from qwen2_ascend import runtime as runtimes
    from qwen2_ascend.model.build import build_model
    from qwen2_ascend.parallel import ParallelLayout

    layout, shapes = ParallelLayout(), []
    for backend in ("torch", "npu"):
        runtimes.destroy_model_parallel()
        runtimes.initialize_model_parallel(layout, 4)
        runtime.seed_all(1)
        (model,) = build_model(tiny_config(), layout, dtype="bf16", backend=backend)
        shapes.append(
            {name: tuple(x.shape) for name, x in model.state_dict().items() if x is not None}
        )
    assert shapes[0] == shapes[1] and len(shapes[0]) == 4 * 7 + 3


@pytest.mark.filterwarnings("default")
@on(SOC_910B)
def test_a_step_grows_by_the_same_number_of_launches_with_every_layer(
    chip, runtime, simulator, tmp_path
):
    """A count of few layers tells that of many; operators on all tensors come in blocks."""
    found = []
    for layers in (1, 2, 3):
        counts = step_launches(runtime, simulator, tmp_path, layers, "")
        found.append(counts["step"] - counts["update"])
    assert found[2] - found[1] == found[1] - found[0]
    layer = golden(chip)["fused"]
    own = len(layer["forward"]) + len(layer["backward"])
    # and the gradient of each of its 7 tensors is added to a sum, measured and, in two, clipped
    assert found[1] - found[0] == own + 4 * 7


@pytest.mark.filterwarnings("default")
@on(SOC_910B)
def test_one_copy_of_q_k_and_v_would_move_as_many_bytes(chip, runtime, simulator):
    """What splitting linear_qkv's output moves today, copies inside CANN included.

    Rotary has its strided q and k copied, and ops/ copies v. One copy of all three before it would
    read and write the same; so would rotating in place, which takes contiguous tensors too.
    """
    import torch

    from npusim.launches import hidden_copies, launch_bytes
    from npusim.simulator import recording
    from qwen2_ascend.ops import get_ops

    ops = get_ops("npu")
    s, b, groups, heads, width = 16, 2, 2, 14, 64
    mixed = torch.randn(s, b, groups, heads // groups + 2, width).bfloat16().npu()
    angles = torch.randn(s, width).bfloat16().npu()

    def rotated(q, k, v):
        with recording() as record:
            q, k = ops.rotary(q, angles, angles), ops.rotary(k, angles, angles)
            parts = (x.reshape(s, b, -1, width) for x in (q, k, v))
            ops.attention(*parts, softmax_scale=0.1)
        return record.launches

    with host_code(simulator):
        now = rotated(*mixed.split([heads // groups, 1, 1], dim=3))
        with recording() as copies:
            split = [x.contiguous() for x in mixed.split([heads // groups, 1, 1], dim=3)]
        once = copies.launches + rotated(*split)

    def moved(launches):
        return sum(launch_bytes(x) + sum(hidden_copies(x)) for x in launches)

    hidden = [len(hidden_copies(launch)) for launch in now if "Rotary" in launch.op]
    assert hidden == [1, 1]
    assert sum(map(len, map(hidden_copies, once))) == 0
    assert moved(now) == moved(once)


def test_no_chip_launches_another_layer():
    assert golden(SOC_910B) == golden(SOC_910C)


def test_fusing_saves_launches_of_every_kind_of_layer():
    counts = {
        name: Counter(x["forward"] + x["backward"]).total() for name, x in golden(SOC_910B).items()
    }
    assert counts["fused"] < counts["torch's own"] / 2 < counts["switched off"] / 2


def test_the_tables_are_those_of_the_document():
    text = BENCHMARKS.read_text(encoding="utf-8")
    assert layer_table(golden(SOC_910B)) in text
    assert re.search(r"python -m npusim\.launches", text)
