"""Pretraining on simulated cards: the losses of transformers, through torch_npu and HCCL."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from distributed.train_worker import FLAGS, LAYOUTS, STEPS, reference
from npusim.env import environment
from npusim.run import command

TOLERANCE = 1e-6
NPU_FLAGS = FLAGS.replace("--device cpu", "--device npu")
LAUNCH = Path(__file__).parents[2] / "launch" / "pretrain_qwen2.py"
REDUCTIONS = {"AllReduce", "Reduce", "ReduceScatter", "ReduceScatterV"}

FULL_RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
PLAIN = (
    "--attention-backend unfused --no-fused-rmsnorm --no-fused-rotary-pos-emb --no-fused-swiglu "
    "--no-fused-adamw"
)
FUSED_OPERATORS = {
    "aclnnFlashAttentionScore",
    "aclnnFlashAttentionScoreGrad",
    "aclnnRmsNorm",
    "aclnnRmsNormGrad",
    "aclnnRotaryPositionEmbeddingV2",
    "aclnnRotaryPositionEmbeddingGrad",
    "aclnnSwiGlu",
    "aclnnSwiGluGrad",
}
RUNS = {
    "tp1": LAYOUTS["tp1-pp1"],
    "tp2": LAYOUTS["tp2"],
    "pp2": LAYOUTS["pp2"],
    "pp2-vpp2": LAYOUTS["pp2-vpp2"],
    "tp2-sp-full-recompute": (2, f"{LAYOUTS['tp2-sp'][1]} {FULL_RECOMPUTE}"),
    "tp2-sp-selective-recompute": (
        2,
        f"{LAYOUTS['tp2-sp'][1]} --recompute-granularity selective",
    ),
    "dp2-distributed-optimizer": LAYOUTS["dp2-distributed-optimizer"],
    "tp2-pp2": LAYOUTS["tp2-pp2"],
    "tp2-plain": (2, f"{LAYOUTS['tp2'][1]} {PLAIN}"),
}

simulated_runs = pytest.mark.parametrize(
    "flags",
    [
        pytest.param(flags, id=name, marks=pytest.mark.simulated(cards=cards, alone="training"))
        for name, (cards, flags) in RUNS.items()
    ],
)


@pytest.fixture(scope="module")
def run():
    """The runtime on this rank's card, and a folder that all ranks share."""
    from distributed.harness import Run
    from qwen2_ascend import runtime

    running = runtime.start("npu", timeout_seconds=60)
    yield Run(running, Path(os.environ["NPUSIM_FOLDER"]))
    running.close()


# Foreign warnings are errors in the CPU's training tests, and torch_npu adds many of its own.
@pytest.mark.filterwarnings("default")
@simulated_runs
def test_losses_are_those_of_transformers(flags, run, record_property):
    from distributed.train_worker import hugging_face_folder, start, steps
    from npusim.cards import hccl_calls
    from npusim.simulator import recording

    training = start(run, f"{NPU_FLAGS} {flags}")
    before = len(hccl_calls())
    with recording() as record:
        results = steps(training, STEPS)
    calls = hccl_calls()[before:]
    fused = set(record.ops) & FUSED_OPERATORS
    assert fused == (set() if PLAIN in flags else FUSED_OPERATORS)
    losses, norms = reference(hugging_face_folder(run, False), False)
    for found, loss, norm in zip(results, losses, norms, strict=True):
        assert abs(found.loss - loss) <= TOLERANCE
        assert abs(found.grad_norm - norm) <= 4 * TOLERANCE
    assert calls or "parallel" not in flags, "nothing went through HCCL"
    assert not [call for call in calls if call.op in REDUCTIONS and call.dtype == "fp64"]
    record_property("hccl", str(Counter((call.op, call.dtype) for call in calls)))


@pytest.mark.timeout(400)
def test_the_launcher_trains_at_tp2_pp2(tmp_path):
    """`torchrun launch/pretrain_qwen2.py --device npu`, as a user types it."""
    from helpers import make_tiny_hugging_face_folder
    from npusim.build import Unavailable

    model = make_tiny_hugging_face_folder(tmp_path / "model")
    flags = f"{NPU_FLAGS} {LAYOUTS['tp2-pp2'][1]}"
    try:
        simulation = environment(num_devices=4)
    except Unavailable as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"no simulated device: {error}")
    script = [str(LAUNCH), *flags.split(), "--load", str(model)]
    result = subprocess.run(
        command(script, torchrun="--standalone --nproc-per-node 4"),
        env=simulation,
        capture_output=True,
        text=True,
        timeout=390,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "device npu (simulated Ascend910B2), backend hccl, 4 process(es)" in result.stdout
    losses = [float(loss) for loss in re.findall(r"iteration \d/4 \| loss (\S+)", result.stdout)]
    expected, _ = reference(model, False)
    assert losses == pytest.approx(expected, abs=1e-4)  # as they are printed
