"""Where the energy of a run can be measured: what every source is.

A source counts joules (RAPL, NVML) or says watts (npu-smi, nvidia-smi). Nothing is estimated: a
device without a source has none, and the reason says what was looked for. Sources that several
processes share are counted by one of them, so that the sum over all ranks is that of the job.

The standard library alone is imported here; `power_rapl`, `power_npu_smi` and `power_nvidia` are
the sources, of which `power_sources` chooses.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen2_ascend.runtime.device import Runtime

COMMAND_SECONDS = 10.0
"""What npu-smi and nvidia-smi may take before they count as failed."""


class NoPowerSource(Exception):
    """Nothing here measures the device's energy; the message says what was looked for."""


class PowerReadingError(RuntimeError):
    """A source that was there gave no figure this time."""


@dataclass(frozen=True, kw_only=True)
class PowerSource:
    """One thing that measures the device of this process."""

    name: str
    """What is measured and by what, for the log."""
    read: Callable[[], float]
    """Gives joules or watts, now; raises PowerReadingError where there is no figure this time."""
    counts_energy: bool
    """Whether `read` gives joules since some moment; else it gives watts."""
    period_seconds: float
    """How often it is worth while to read it."""


def power_tool(name: str, command: Sequence[str], watts: Callable[[str], float]) -> PowerSource:
    """A figure of a program that prints the power each time it is run.

    Args:
        name: of the source.
        command: the program and its arguments.
        watts: gives the figure in what was printed; raises PowerReadingError where there is none.
    """
    return PowerSource(
        name=name, read=lambda: watts(ask(command)), counts_energy=False, period_seconds=1.0
    )


def counted_elsewhere(name: str) -> PowerSource:
    """The source of a process whose device another process of the host already counts: no joules,
    which change nothing where they are added."""
    return PowerSource(name=name, read=lambda: 0.0, counts_energy=True, period_seconds=60.0)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which device of the host a process uses."""

    device: str
    """cpu, cuda or npu."""
    local_rank: int = 0
    """The process's rank on its host; also the index of its device."""
    simulated: bool = False
    """The device is not hardware."""
    uuid: Callable[[], str] = field(default=lambda: _cuda_uuid(0))
    """Asks CUDA what the device is called, as in GPU-8f2c...; numbers depend on the environment."""

    @classmethod
    def of(cls, runtime: Runtime) -> Place:
        """The place of a started process."""
        return cls(
            device=runtime.name,
            local_rank=runtime.local_rank,
            simulated=runtime.simulated,
            uuid=lambda: _cuda_uuid(runtime.local_rank),
        )


def find_command(name: str, environ: Mapping[str, str]) -> str:
    """The path of a program.

    Raises:
        NoPowerSource: it is not installed.
    """
    path = shutil.which(name, path=environ.get("PATH", os.defpath))
    if path is None:
        raise NoPowerSource(f"{name}: is not on PATH.")
    return path


def ask(command: Sequence[str]) -> str:
    """What a program prints.

    Raises:
        PowerReadingError: it failed or took longer than `COMMAND_SECONDS`; with what it said.
    """
    said = " ".join([Path(command[0]).name, *command[1:]])
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=COMMAND_SECONDS,
            env={**os.environ, "LC_ALL": "C"},
            start_new_session=True,  # Ctrl-C is for the run, not for its thermometer
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PowerReadingError(f"`{said}` took longer than {COMMAND_SECONDS:g} s") from None
    except OSError as error:
        raise PowerReadingError(f"`{said}` cannot be run: {error}") from None
    text = done.stdout.decode("utf-8", errors="replace")
    if done.returncode:
        lines = " ".join(text.split())[:200] or "without a word"
        raise PowerReadingError(f"`{said}` ended with {done.returncode}: {lines}")
    return text


def number(text: str) -> float | None:
    """A figure of a tool's table; None for NA, -, [N/A] and the like."""
    try:
        value = float(text.strip().removesuffix("W").strip())
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None


def _cuda_uuid(index: int) -> str:
    import torch

    return f"GPU-{torch.cuda.get_device_properties(index).uuid}"
