"""AdamW as one kernel per tensor: the same update, less memory read and written, resumable."""

from __future__ import annotations

import struct

import pytest

from distributed.train_worker import LAYOUTS, save, start, steps
from npusim.test_training import NPU_FLAGS

pytestmark = [
    pytest.mark.simulated(alone="training"),
    # Foreign warnings are errors in the CPU's training tests, and torch_npu adds many of its own.
    pytest.mark.filterwarnings("default"),
]

LR, BETAS, EPS, DECAY = 1e-2, (0.85, 0.99), 1e-7, 0.1


def updated(device: str, **how):
    """Parameters after five updates, the same on every device; and the optimizer."""
    import torch

    generator = torch.Generator().manual_seed(1)
    sizes = [(7, 5), (9,), (3, 2, 2)]
    values = [torch.randn(size, generator=generator) for size in sizes]
    parameters = [value.to(device).requires_grad_() for value in values]
    optimizer = torch.optim.AdamW(
        parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, **how
    )
    for _ in range(5):
        for parameter in parameters:
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.to(device)
        optimizer.step()
    return [parameter.detach().cpu() for parameter in parameters], optimizer


def test_the_update_is_that_of_plain_adamw(run, simulator):
    import torch

    from npusim.launches import host_code, launch_bytes
    from npusim.simulator import recording

    expected, _ = updated("cpu", foreach=False)
    with host_code(simulator), recording() as record:
        found, optimizer = updated("npu", fused=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    kernels = [launch for launch in record.launches if launch.op == "aclnnApplyAdamWV2"]
    assert len(kernels) == 5 * 3
    # what the host hands over in 32-bit registers; the kernel counts on from the step before
    words = [struct.unpack("f", struct.pack("d", word)[:4])[0] for word in kernels[0].doubles[:5]]
    assert words == pytest.approx([LR, *BETAS, DECAY, EPS])
    assert kernels[0].arguments[:6] == ("f32[7,5]", "f32[7,5]", "f32[7,5]", 0, "f32[7,5]", "f32[]")
    assert record.ops.count("aclnnSubs") == len(kernels)
    steps = [state["step"] for state in optimizer.state.values()]
    assert all(step.device.type == "npu" and step.item() == 5 for step in steps)
    with host_code(simulator), recording() as other:
        updated("npu", foreach=True)
    fused, foreach = (sum(map(launch_bytes, x.launches)) for x in (record, other))
    assert fused < foreach / 2


@pytest.mark.parametrize("flags", ["", "--bf16 --use-distributed-optimizer", "--fp16"])
def test_training_is_fused_unless_it_is_switched_off(flags, run, simulator):
    from npusim.launches import host_code
    from npusim.simulator import recording

    numbers = {}
    for switch in ("", "--no-fused-adamw"):
        flags = f"{flags} --initial-loss-scale 1024"
        training = start(run, f"{NPU_FLAGS} --global-batch-size 2 {flags} {switch}")
        with host_code(simulator), recording() as record:
            found = steps(training, 2)
        numbers[switch] = [(step.loss, step.grad_norm) for step in found]
        assert ("aclnnApplyAdamWV2" in record.ops) is (switch == "")
    assert numbers[""] == [pytest.approx(x, abs=2e-6) for x in numbers["--no-fused-adamw"]]


@pytest.mark.parametrize(
    ("layout", "form", "flags"),
    [("tp1-pp1", "torch_dist", ""), ("tp1-pp1", "torch", "--bf16 --use-distributed-optimizer")],
    ids=["fp32", "bf16-distributed-optimizer"],
)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(layout, form, flags, run):
    """Either may have saved it: the fused update, or the other one."""
    flags = f"{NPU_FLAGS} {LAYOUTS[layout][1]} --global-batch-size 2 --ckpt-format {form} {flags}"
    through = [step.loss for step in steps(start(run, flags), 4)]
    off = "--no-fused-adamw"
    for saver, readers in {"": ("", off), off: ("",)}.items():
        folder = run.folder / f"resume{flags.count('bf16')}{saver}"
        saving = start(run, f"{flags} {saver} --save {folder}")
        steps(saving, 2)
        save(saving)
        for reader in readers:
            resumed = start(run, f"{flags} {reader}", load=folder)
            # two steps: one shared count of updates spoils only the second
            losses = [step.loss for step in steps(resumed, 2)]
            exact = (saver, reader) == ("", "")
            assert losses == (through[2:] if exact else pytest.approx(through[2:], abs=1e-6))


def test_a_step_waits_for_the_device_four_times(run):
    """All of them after backward; no more for a log of each step. fp16 asks for overflows too."""
    from npusim.transfers import counting_transfers
    from qwen2_ascend.training.optimizer import loss_scale

    limits = {"": 4, "--bf16": 4, "--fp16 --initial-loss-scale 1024": 5}
    for flags, limit in limits.items():
        training = start(run, f"{NPU_FLAGS} --global-batch-size 4 {flags}")
        steps(training, 1)
        with counting_transfers() as transfers:
            steps(training, 1)
            loss_scale(training.optimizer)
        assert len(transfers) <= limit, "\n".join(transfers)
