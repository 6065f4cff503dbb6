"""--optimizer-cpu-offload on simulated cards: the same losses, less memory of the device."""

from __future__ import annotations

import os
from typing import Any

import pytest

from npusim.conftest import INSIDE
from npusim.test_training import NPU_FLAGS

FLAGS = f"{NPU_FLAGS} --use-distributed-optimizer --num-workers 0"
STEPS = 3
OFFLOAD = "--optimizer-cpu-offload --optimizer-offload-fraction"
TOLERANCE = 1e-6
"""Tolerance of losses: none differed. The host's and the device's AdamW may round otherwise."""

pytestmark = [
    # Foreign warnings are errors in the CPU's training tests, and torch_npu adds many of its own.
    pytest.mark.filterwarnings("default"),
    pytest.mark.simulated(cards=2, alone="offload"),
]

if INSIDE in os.environ:
    # the caching allocator counts what is alive; read at the first allocation
    os.environ.pop("PYTORCH_NO_NPU_MEMORY_CACHING", None)
    os.environ["PYTORCH_NPU_ALLOC_CONF"] = "expandable_segments:False"


def held(training: Any) -> tuple[int, int]:
    """(elements whose optimizer's tensors are on the host, all that this rank updates)."""
    from qwen2_ascend.training.optimizer import state_slices

    slices = state_slices(training.optimizer).values()
    devices = [
        ({t.device.type for t in own.tensors.values()}, own.stop - own.start) for own in slices
    ]
    assert all(len(types) == 1 for types, _ in devices), devices
    return sum(n for types, n in devices if types == {"cpu"}), sum(n for _, n in devices)


@pytest.mark.parametrize("precision", ["--bf16", "--fp16 --initial-loss-scale 1024"])
def test_losses_and_bytes(precision, run):
    """12 bytes of each offloaded element leave the device: its fp32 weight and two moments."""
    from distributed.train_worker import start, steps
    from npusim.live_bytes import alive

    steps(start(run, f"{FLAGS} {precision}"), 1)  # a process makes the causal mask once
    before = alive()
    training = start(run, f"{FLAGS} {precision}")
    plain = [result.loss for result in steps(training, STEPS)]
    whole = alive() - before
    del training
    for fraction in (0.5, 1.0):
        before = alive()
        training = start(run, f"{FLAGS} {precision} {OFFLOAD} {fraction}")
        losses = [result.loss for result in steps(training, STEPS)]
        off = max(abs(a - b) for a, b in zip(losses, plain, strict=True))
        assert off <= TOLERANCE, (fraction, losses, plain)
        on_host, own = held(training)
        assert fraction <= on_host / own <= min(1.0, fraction + 0.3), (on_host, own)
        gone, now = 12 * on_host, alive() - before
        print(precision, fraction, f"off {off:.1e}", f"{on_host / own:.2f} on the host", whole, now)
        assert now == pytest.approx(whole - gone, rel=0.02)
        del training


def test_checkpoints(run):
    """The same fraction resumes to the last bit; runs with another one and without go on, too."""
    from distributed.train_worker import save, start, state_of, steps

    def losses(training):
        return [result.loss for result in steps(training, 2)]

    for form, fraction, other in (("torch_dist", 0.5, f"{OFFLOAD} 1.0"), ("torch", 1.0, "")):
        flags, folder = f"{FLAGS} --bf16 {OFFLOAD} {fraction}", run.folder / f"offload-{form}"
        saving = start(run, f"{flags} --ckpt-format {form} --save {folder}")
        steps(saving, 2)
        save(saving)
        state = state_of(saving)
        expected = losses(saving)
        resumed = start(run, flags, load=folder)
        again = state_of(resumed)
        changed = [name for name in state if not (state[name].cpu() == again[name].cpu()).all()]
        assert state.keys() == again.keys() and not changed, changed
        assert losses(resumed) == expected
        found = losses(start(run, f"{FLAGS} --bf16 {other}", load=folder))
        assert found == pytest.approx(expected, abs=1e-3)
    folder = run.folder / "plain"
    saving = start(run, f"{FLAGS} --bf16 --save {folder}")
    steps(saving, 2)
    save(saving)
    expected = losses(saving)  # before another start takes its process groups away
    resumed = start(run, f"{FLAGS} --bf16 {OFFLOAD} 0.5", load=folder)
    assert losses(resumed) == pytest.approx(expected, abs=1e-3)
