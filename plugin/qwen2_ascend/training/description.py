"""configuration.json beside metrics.jsonl: how a run was configured, where, and what was planned.

It is for whoever compares runs later; nothing reads it to go on from. Variables of the environment
are written only where their names belong to the libraries that a run is made of, and no secret's.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2_ascend import __version__
from qwen2_ascend.telemetry.reporting import attempt

if TYPE_CHECKING:
    from qwen2_ascend.runtime import Runtime
    from qwen2_ascend.training.plan import RunPlan

DESCRIPTION_FILE = "configuration.json"
PACKAGES = (
    "torch",
    "torch_npu",
    "megatron-core",
    "mindspeed",
    "transformers",
    "numpy",
    "safetensors",
    "deepspeed",
    "peft",
)
VARIABLES = re.compile(
    r"(HCCL|ASCEND|NPU|PYTORCH|TORCH|CUDA|NCCL|GLOO|OMP|MKL|CPU_AFFINITY|TASK_QUEUE|QWEN2_ASCEND)"
    r"(_[A-Z0-9_]+)?"
)
SECRETS = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH")


def write_description(folder: Path, plan: RunPlan, runtime: Runtime, train_iters: int) -> None:
    """Writes configuration.json into a folder.

    Raises:
        OSError: it cannot be written.
    """
    from qwen2_ascend.checkpoint.staging import write_file

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(description(plan, runtime, train_iters), indent=1, default=str)
    write_file(folder / DESCRIPTION_FILE, f"{text}\n".encode())


def description(plan: RunPlan, runtime: Runtime, train_iters: int) -> dict[str, Any]:
    """What configuration.json says.

    Args:
        plan: of the run.
        runtime: its device.
        train_iters: steps of the whole run.
    """
    from qwen2_ascend.training.plan import flags

    return {
        "written_by": f"qwen2-ascend {__version__}",
        "train_iters": train_iters,
        "flags": flags(plan.settings),
        "model": asdict(plan.config),
        "environment": environment(runtime, os.environ),
        **(attempt(f"what {DESCRIPTION_FILE} says was planned", _planned, plan, runtime) or {}),
    }


def environment(runtime: Runtime, variables: Mapping[str, str]) -> dict[str, str]:
    """Device, processes, releases, and the variables that the libraries of a run listen to."""
    found = {
        "device": f"{runtime.name} ({runtime.device_name()})",
        "processes": str(runtime.world_size),
        "host": platform.node(),
        "system": platform.platform(),
        "cpu cores": str(os.cpu_count()),
        "python": sys.version.split()[0],
        "qwen2-ascend": __version__,
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    kept = {
        name: value
        for name, value in sorted(variables.items())
        if VARIABLES.fullmatch(name) and not SECRETS.search(name)
    }
    return found | kept


def _planned(plan: RunPlan, runtime: Runtime) -> dict[str, Any]:
    """The planned memory of the fullest rank, and the device's peak, if the planner knows them."""
    from qwen2_ascend.planning.devices import device_called
    from qwen2_ascend.planning.memory import fullest_stage
    from qwen2_ascend.training.planned import as_cut, not_planned

    settings, device = plan.settings, device_called(runtime.device_name())
    if device is None or hasattr(settings, "zero") or not_planned(settings):
        return {}
    _, memory = fullest_stage(as_cut(settings, plan.config, runtime.world_size, runtime.name))
    found: dict[str, Any] = {"planned_memory_bytes": memory.total}
    if runtime.name != "cpu":  # the planner's CPU is a round number, no product
        found["peak_flops"] = device.peak_flops
    return found
