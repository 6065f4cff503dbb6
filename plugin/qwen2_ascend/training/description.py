"""run.json beside metrics.jsonl: how a run was configured, where it runs, what was planned.

It is for whoever compares runs later, and for `plan --from-log`; nothing reads it to go on from.
Variables of the environment are written only where their names belong to the libraries that a run
is made of, and no secret's.
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
from qwen2_ascend.errors import UserError
from qwen2_ascend.files import write_file
from qwen2_ascend.machine import local_world_size, num_cores
from qwen2_ascend.planning.devices import find_device
from qwen2_ascend.planning.log import RUN_FILE, as_entry, with_start
from qwen2_ascend.planning.memory import fullest_stage
from qwen2_ascend.telemetry.reporting import attempt
from qwen2_ascend.training.plan import flags
from qwen2_ascend.training.planned import layout_of_run

if TYPE_CHECKING:
    from qwen2_ascend.runtime import Runtime
    from qwen2_ascend.training.loop import TrainingRun
    from qwen2_ascend.training.plan import RunPlan

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


def write_description(folder: Path, plan: RunPlan, run: TrainingRun) -> None:
    """Writes run.json into the folder of metrics.jsonl, when a run begins or goes on.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    runtime, first_iteration = run.runtime, run.progress.iteration
    told = {
        "written_by": f"qwen2-ascend {__version__}",
        "train_iters": run.train_iters,
        "flags": flags(plan.settings),
        "model": asdict(plan.config),
        "environment": environment(runtime, os.environ),
        **(attempt(f"what {RUN_FILE} says was planned", _planned, plan, runtime) or {}),
    }
    entry = attempt(f"how {RUN_FILE} tells the layout", _start, plan, runtime, first_iteration)
    told["starts"] = with_start(folder / RUN_FILE, entry, first_iteration)
    text = json.dumps(told, indent=1, default=str)
    write_file(folder / RUN_FILE, f"{text}\n".encode())


def environment(runtime: Runtime, variables: Mapping[str, str]) -> dict[str, str]:
    """Device, processes, releases, and the variables that the libraries of a run listen to."""
    found = {
        "device": f"{runtime.name} ({runtime.device_name()})",
        "processes": str(runtime.world_size),
        "host": platform.node(),
        "system": platform.platform(),
        "cpu cores": str(num_cores()),
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
    cut = layout_of_run(plan.settings, plan.config, runtime)
    try:
        device = find_device("CPU" if runtime.name == "cpu" else runtime.device_name())
    except UserError:
        return {}
    if cut is None:
        return {}
    _, memory = fullest_stage(cut)
    found: dict[str, Any] = {"planned_memory_bytes": memory.total}
    if runtime.name != "cpu":  # the planner's CPU is a round number, no product
        found["peak_flops"] = device.peak_flops
    return found


def _start(plan: RunPlan, runtime: Runtime, first_iteration: int) -> dict[str, Any] | None:
    if runtime.simulated:
        return None
    cut = layout_of_run(plan.settings, plan.config, runtime)
    if cut is None:
        return None
    per_node = local_world_size(runtime.world_size)
    return as_entry(cut, runtime.device_name(), per_node, first_iteration)
