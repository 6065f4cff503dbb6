"""Runtime: one process's device, its place among the others, and what can be asked of it."""

from __future__ import annotations

import os
import random
import resource
from dataclasses import dataclass
from pathlib import Path

import torch

from qwen2_ascend.errors import UserError
from qwen2_ascend.runtime import npu

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
    """How long a collective may wait for the other ranks."""

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
        import numpy

        from qwen2_ascend.runtime.megatron_compat import model_parallel_seed

        seed = model_parallel_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def set_deterministic(self) -> None:
        """Makes torch choose deterministic kernels and refuse where it has none."""
        if self.name == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if self.name == "npu":
            os.environ.update(
                HCCL_DETERMINISTIC="true",
                CLOSE_MATMUL_K_SHIFT="1",
                ATB_MATMUL_SHUFFLE_K_ENABLE="0",
            )
        torch.use_deterministic_algorithms(True)

    def describe(self) -> str:
        """One line for a log: device, backend, processes and releases."""
        import megatron.core

        device = self.name if self.name == "cpu" else f"{self.name} ({self._device_name()})"
        return (
            f"device {device}, backend {self.backend}, {self.world_size} process(es), "
            f"torch {torch.__version__}, megatron-core {megatron.core.__version__}"
        )

    def close(self) -> None:
        """Leaves the process groups; nothing may communicate afterwards."""
        from qwen2_ascend.runtime import startup
        from qwen2_ascend.runtime.megatron_compat import destroy_model_parallel

        destroy_model_parallel()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        startup.forget(self)

    def _device_name(self) -> str:
        return torch.get_device_module(self.device).get_device_name()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
