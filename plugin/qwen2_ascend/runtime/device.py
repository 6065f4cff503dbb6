"""Runtime: one process's device, its place among the others, and what can be asked of it."""

from __future__ import annotations

import os
import random
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

from qwen2_ascend.errors import UserError
from qwen2_ascend.runtime import diagnosis, npu
from qwen2_ascend.runtime import meeting as meetings
from qwen2_ascend.runtime.megatron_compat import destroy_model_parallel, model_parallel_seed

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}


def select_device(requested: str | None = None) -> str:
    """The device to run on: "npu" where one is usable, else "cuda", else "cpu".

    Args:
        requested: what `--device` says; None chooses.

    Raises:
        UserError: the requested device is unknown or cannot be used, with what is missing.
    """
    if requested is None:
        if npu.missing() is None:
            return "npu"
        return "cuda" if torch.cuda.is_available() else "cpu"
    if requested not in BACKENDS:
        raise UserError(f"device={requested!r} is not one of {', '.join(BACKENDS)}.")
    if requested == "npu" and (fault := npu.missing()):
        raise UserError(f"device=npu cannot be used: {fault}")
    if requested == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"device=cuda cannot be used: torch {torch.__version__} sees no CUDA device."
        )
    return requested


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """An accelerator's memory since the start or `reset_peak_memory`, in bytes."""

    peak_allocated: int
    """Most that tensors held."""
    peak_reserved: int
    """Most that torch's allocator held; much more than allocated means fragmentation."""
    total: int
    """What the device has."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """One process of a run."""

    name: str
    """cpu, cuda or npu."""
    backend: str
    """torch.distributed's backend: gloo, nccl or hccl."""
    device: torch.device
    rank: int
    world_size: int
    local_rank: int
    timeout_seconds: float
    """How long torch's process groups wait for the other ranks."""
    simulated: bool = False
    """An npu that is not hardware: its speed and memory mean nothing."""
    notes: tuple[str, ...] = ()
    """For the log: what was set in the environment, MindSpeed, why there is no NPU."""
    on_close: Callable[[Runtime], None] = lambda runtime: None
    """Called by `close` at its end."""

    def synchronize(self) -> None:
        """Waits until the device has done all that was given to it."""
        if self.name != "cpu":
            torch.get_device_module(self.device).synchronize()

    def peak_memory_bytes(self) -> int:
        """Most memory held since the start or `reset_peak_memory`.

        On an accelerator what torch allocated; on the CPU the process's resident set.
        """
        if self.name != "cpu":
            return torch.get_device_module(self.device).max_memory_allocated()
        for line in _lines("/proc/self/status"):
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def memory(self) -> MemoryUse | None:
        """The accelerator's memory; None on the CPU and on a simulated device."""
        if self.name == "cpu" or self.simulated:
            return None
        module = torch.get_device_module(self.device)
        return MemoryUse(
            peak_allocated=module.max_memory_allocated(),
            peak_reserved=module.max_memory_reserved(),
            total=module.get_device_properties(self.device).total_memory,
        )

    def reached(self, step: int) -> None:
        """Lets the other ranks know how far this one is, should it be lost."""
        meeting = meetings.current()
        if meeting is not None and meeting.watchdog is not None:
            meeting.watchdog.reached(step)

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if self.name == "cpu":
            torch.distributed.barrier()
        else:  # else torch guesses the device, and says so
            torch.distributed.barrier(device_ids=[self.device.index])

    def explain(self, error: BaseException) -> str | None:
        """What an error of the device's software means and what to do; None when it is unknown."""
        if self.name == "cpu":
            return None
        told = diagnosis.explain(str(error), os.environ)
        if told is None or not told.startswith("out of memory") or (use := self.memory()) is None:
            return told
        gib = 2**30
        return (
            f"{told} Peak on this device: {use.peak_allocated / gib:.2f} GiB allocated, "
            f"{use.peak_reserved / gib:.2f} GiB reserved, of {use.total / gib:.2f} GiB."
        )

    def reset_peak_memory(self) -> None:
        """Starts `peak_memory_bytes` anew; on a CPU whose kernel refuses, the peak stays."""
        if self.name != "cpu":
            torch.get_device_module(self.device).reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            return

    def seed_all(self, seed: int) -> None:
        """Seeds Python, numpy and torch, and megatron-core's trackers once its groups exist.

        Pipeline stages draw differently (seed + 100 * stage, as Megatron-LM does);
        data-parallel ranks draw alike.
        """
        seed = model_parallel_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def describe(self) -> str:
        """One line for a log: device, backend, processes and releases."""
        import megatron.core

        # since 0.18 it has the commit of whatever git tree it lies in behind a plus
        version = megatron.core.__version__.partition("+")[0]
        device = self.name
        if device != "cpu":
            played = "simulated " if self.simulated else ""
            device = f"{device} ({played}{self.device_name()})"
        return (
            f"device {device}, backend {self.backend}, {self.world_size} process(es), "
            f"torch {torch.__version__}, megatron-core {version}"
        )

    def dtype_notes(self, dtype: str) -> tuple[str, ...]:
        """What a log should say of a run that is computed in `dtype` here.

        Args:
            dtype: fp32, bf16 or fp16.
        """
        # torch asks this of 16 bits alone: of fp32 there is no such operator
        supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{dtype}_supported", lambda: True)
        if self.name != "cpu" or supported():
            return ()
        return (
            f"warning: torch has no fast {dtype} products for this CPU; a training step may take "
            f"tens of times as long as in fp32. To try things here leave --{dtype} out",
        )

    def close(self) -> None:
        """Leaves the process groups; nothing may communicate afterwards."""
        destroy_model_parallel()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        self.on_close(self)

    def device_name(self) -> str:
        """The product as its driver names it; "cpu"."""
        if self.name == "cpu":
            return "cpu"
        return torch.get_device_module(self.device).get_device_name()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
