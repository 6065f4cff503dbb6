"""The kinds of devices that these tests run on, chosen by HARDWARE: npu (the default), cuda or cpu.

`cpu` is no hardware: it runs every test of one device small, to prove the tests themselves.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

VARIABLE = "HARDWARE"

NPU_PROBE = """
import json
import torch_npu
from qwen2_ascend.runtime import npu
import torch
count = torch.npu.device_count()
print(json.dumps({"devices": count, "simulated": npu.is_simulated(),
    "chip": torch.npu.get_device_name(0) if count else None,
    "memory_gib": torch.npu.get_device_properties(0).total_memory / 2**30 if count else None}))
"""
CUDA_PROBE = """
import json
import torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
properties = torch.cuda.get_device_properties(0) if count else None
print(json.dumps({"devices": count, "cuda": torch.version.cuda,
    "chip": properties.name if count else None,
    "memory_gib": properties.total_memory / 2**30 if count else None}))
"""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the larger runs measure."""

    train: str
    """Flags of the training run and of the training benchmark."""
    lengths: str
    """Tokens of the attention benchmark."""
    steps: str
    """Steps of each benchmark."""
    layers: int | None
    """Layers of the model that generates; None for all of the 0.5B's."""
    new_tokens: int


FULL = Sizes(
    train="--config 0.5B --seq-length 2048 --global-batch-size 8 --micro-batch-size 1",
    lengths="2048 8192",
    steps="--steps 4 --rounds 3",
    layers=None,
    new_tokens=128,
)
SMALL = Sizes(
    train="--seq-length 32 --global-batch-size 2 --micro-batch-size 1",
    lengths="32",
    steps="--steps 1 --rounds 1",
    layers=2,
    new_tokens=8,
)


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A kind of device."""

    name: str
    """The launchers' --device."""
    backend: str
    """The operators' implementation there."""
    find: Callable[[], tuple[str | None, dict[str, Any]]]
    """(why there is none or None, what is known of it)."""
    sizes: Sizes = FULL

    @property
    def report(self) -> str:
        """The folder of the report, unless REPORT or NPU_REPORT names one."""
        given = os.environ.get("REPORT", os.environ.get("NPU_REPORT"))
        return given or f"{self.name}-report"


def find_npu() -> tuple[str | None, dict[str, Any]]:
    if (text := npu_smi("info")) is None:
        return "`npu-smi info` does not work here", {}
    reason, device = _probed("torch_npu", NPU_PROBE)
    device = {"driver": parse_driver(text), **device}
    if reason is None and device["simulated"]:
        return "the device is simulated", device
    return reason, device


def find_cuda() -> tuple[str | None, dict[str, Any]]:
    reason, device = _probed("torch", CUDA_PROBE)
    text = _printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return reason, {"driver": text.split()[0] if text else None, **device}


def find_cpu() -> tuple[str | None, dict[str, Any]]:
    return None, {"devices": 1, "chip": "the CPU, which proves the tests and measures nothing"}


def _probed(package: str, probe: str) -> tuple[str | None, dict[str, Any]]:
    environ = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", probe],
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return f"{package} does not work: {last[0]}", {}
    device = json.loads(done.stdout.splitlines()[-1])
    return (None if device["devices"] else f"{package} sees no device"), device


KINDS: Mapping[str, Hardware] = {
    "npu": Hardware(name="npu", backend="npu", find=find_npu),
    "cuda": Hardware(name="cuda", backend="torch", find=find_cuda),
    "cpu": Hardware(name="cpu", backend="torch", find=find_cpu, sizes=SMALL),
}


def chosen() -> Hardware:
    """The kind that HARDWARE names."""
    name = os.environ.get(VARIABLE, "npu")
    assert name in KINDS, f"{VARIABLE}={name} is not one of {', '.join(KINDS)}"
    return KINDS[name]


# --- what npu-smi says ----------------------------------------------------------------------------


def npu_smi(*arguments: str) -> str | None:
    """What npu-smi prints, or None where it is not there or fails."""
    return _printed("npu-smi", *arguments)


def _printed(name: str, *arguments: str) -> str | None:
    program = shutil.which(name)
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, errors="replace", timeout=60
        )
    except (subprocess.TimeoutExpired, OSError):
        return None
    return done.stdout if done.returncode == 0 else None


def parse_driver(text: str) -> str | None:
    """The version in the first line of `npu-smi info`."""
    found = re.search(r"Version:\s*([\w.]+)", text)
    return found[1] if found else None
