"""The device of a process that is measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from qwen2_ascend import runtime as runtimes
from qwen2_ascend.errors import UserError
from qwen2_ascend.launching import silence_foreign_warnings
from qwen2_ascend.runtime import Runtime

T = TypeVar("T")


def started_runtime(device: str, *, for_megatron: bool = False) -> Runtime:
    """The device to measure on; on the CPU only megatron-core needs anything redirected for it.

    Raises:
        UserError: it cannot be used, or is none.
    """
    if device == "cpu" and not for_megatron:
        return Runtime(
            name="cpu",
            backend="gloo",
            device=torch.device("cpu"),
            rank=0,
            world_size=1,
            local_rank=0,
            timeout_seconds=600,
        )

    silence_foreign_warnings()
    runtime = runtimes.start(device)
    refuse_simulated(runtime)
    return runtime


def refuse_simulated(runtime: Runtime) -> None:
    """Measures nothing on a device that is played.

    Raises:
        UserError: it is.
    """
    if runtime.simulated:
        raise UserError("the npu is simulated; its speed and its memory mean nothing.")


def measured(runtime: Runtime, work: Callable[[], T]) -> tuple[T, dict[str, Any]]:
    """Does some work on a device, until that has done all of it.

    Returns:
        What `work` returns. Then the device's name, the most bytes that it held, and seconds:
        `wall` on the clock, `cpu` of all threads of this process, which count on a machine with
        other work.
    """
    runtime.reset_peak_memory()
    runtime.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    runtime.synchronize()
    return result, {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "peak_memory_bytes": runtime.peak_memory_bytes(),
        "device": runtime.device_name(),
    }
