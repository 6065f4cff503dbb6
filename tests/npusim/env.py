"""The environment in which the genuine torch_npu runs on the simulated device."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from npusim.build import PRELOADED, build, find_wheel

SOC_910B = "Ascend910B2"
SOC_910C = "Ascend910_9391"

TESTS = Path(__file__).parents[1]

SETTINGS = {
    # transformers and torch would import torch_npu by themselves, before we are ready
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    # an operator that fails says so at once, and later ones do not vanish
    "ASCEND_LAUNCH_BLOCKING": "1",
    "TASK_QUEUE_ENABLE": "0",
    # fresh memory is fresh and NaN: an output that nobody computed is seen
    "PYTORCH_NO_NPU_MEMORY_CACHING": "1",
    "TORCH_NPU_SIM_POISON": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
}


def environment(
    *,
    soc: str = SOC_910B,
    num_devices: int = 8,
    hccl_timeout_seconds: int = 30,
    base: Mapping[str, str] = os.environ,
) -> dict[str, str]:
    """Environment variables for a process that is to see `num_devices` simulated cards.

    Args:
        soc: the chip's name, which torch_npu's host code looks at.
        num_devices: on this machine.
        hccl_timeout_seconds: how long a simulated card waits for the others.
        base: what to add to. Nothing of an installed CANN is taken over.

    Raises:
        Unavailable: the simulated device cannot be had on this machine.
    """
    wheel = find_wheel()
    libraries = build(wheel)
    python_path = [str(wheel.site), str(TESTS), str(TESTS.parent / "plugin")]
    if "PYTHONPATH" in base:
        python_path.append(base["PYTHONPATH"])
    return {
        **{name: value for name, value in base.items() if not name.startswith("ASCEND_")},
        **SETTINGS,
        "LD_LIBRARY_PATH": str(libraries),
        "LD_PRELOAD": str(libraries / PRELOADED),
        "PYTHONPATH": os.pathsep.join(python_path),
        "TORCH_NPU_SIM_SOC": soc,
        "TORCH_NPU_SIM_DEVICES": str(num_devices),
        "HCCL_SIM_TIMEOUT": str(hccl_timeout_seconds),
    }
