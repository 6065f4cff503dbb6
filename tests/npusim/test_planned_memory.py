"""What the planner says of npu layers is what torch_npu's own allocator hands out.

The tensors are those that torch_npu's host code allocates and its autograd keeps; the allocator is
its caching one, which the other simulated tests go without. What CANN and HCCL take is not its.
"""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest

from npusim.conftest import INSIDE

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1-pp1-bf16": {"dtype": "bf16"},
    "tp1-pp1-full-chunked": {"recompute": "full", "chunk": 64},
    "tp1-pp1-lora-selective-bf16": {"lora": 4, "recompute": "selective", "dtype": "bf16"},
    "tp2-sp-bf16": {"tp": 2, "sequence_parallel": True, "dtype": "bf16"},
}

if INSIDE in os.environ:
    # read once, at the first allocation, which is later than this import
    os.environ.pop("PYTORCH_NO_NPU_MEMORY_CACHING", None)
    # the simulated runtime reserves no addresses
    os.environ["PYTORCH_NPU_ALLOC_CONF"] = "expandable_segments:False"


# Foreign warnings are errors in the CPU's training tests, and torch_npu adds many of its own.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(
            layout,
            id=name,
            marks=pytest.mark.simulated(cards=layout.get("tp", 1), alone="planned memory"),
        )
        for name, layout in LAYOUTS.items()
    ],
)
def test_the_peak_is_the_planned_one(layout: dict[str, Any], run):
    import torch

    from distributed.train_worker import steps
    from planning.planning_worker import planned, start, weights
    from qwen2_ascend.planning.memory import HCCL_BYTES, communicators, stage_memory

    cut = planned(backend="npu", **layout)
    gc.collect()  # what the layout before this one left, but for the causal mask
    training = start(cut, run, weights(cut, run))
    steps(training, 1)
    gc.collect()
    at_rest = torch.npu.memory_allocated()
    torch.npu.reset_peak_memory_stats()
    steps(training, 1)
    peak = torch.npu.max_memory_allocated()
    memory = stage_memory(cut, 0)
    hccl = communicators(cut) * HCCL_BYTES
    rest = at_rest / (memory.at_rest + memory.buffers - hccl) - 1
    above = peak / (memory.total - hccl) - 1
    told = f"at rest {rest:+.2%}, peak {peak:,} {above:+.2%} of {memory}, {hccl:,} of it HCCL's"
    print(told)
    assert abs(rest) < 0.02, told
    assert abs(above) < 0.03, told
