"""An NVIDIA GPU's energy by NVML, or its power by nvidia-smi where nvidia-ml-py is not installed.

NVML counts millijoules since the driver was loaded, from Volta on; older GPUs say milliwatts.
(NVML API reference, nvmlDeviceGetTotalEnergyConsumption and nvmlDeviceGetPowerUsage.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from qwen2_ascend.runtime.power import (
    NoPowerSource,
    PowerReadingError,
    PowerSource,
    find_command,
    number,
    power_tool,
)


def open_nvml(uuid: str) -> PowerSource:
    """The GPU's energy counter, or its power where it has none.

    Args:
        uuid: as nvidia-smi -L shows it, GPU-8f2c...

    Raises:
        NoPowerSource: nvidia-ml-py is not installed, or NVML knows neither figure.
    """
    try:
        import pynvml  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise NoPowerSource(
            "NVML: nvidia-ml-py is not installed (pip: qwen2-ascend[energy])."
        ) from None
    try:
        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError as error:
        raise NoPowerSource(f"NVML: {uuid}: {error}.") from None
    return _first_that_answers(pynvml, device, uuid)


def _first_that_answers(pynvml: Any, device: Any, uuid: str) -> PowerSource:
    faults = []
    for what, counts, ask_millis in (
        ("energy counter", True, pynvml.nvmlDeviceGetTotalEnergyConsumption),
        ("power", False, pynvml.nvmlDeviceGetPowerUsage),
    ):
        source = PowerSource(
            name=f"NVML, {what} of {uuid}",
            read=partial(_read, ask_millis, device, pynvml.NVMLError),
            counts_energy=counts,
            period_seconds=0.5 if counts else 0.1,
        )
        try:
            source.read()
        except PowerReadingError as error:
            faults.append(f"no {what} ({error})")
            continue
        return source
    raise NoPowerSource(f"NVML: {uuid} has {' and '.join(faults)}.")


def _read(ask_millis: Callable[[Any], int], device: Any, failure: type[Exception]) -> float:
    """Joules since the driver was loaded, or watts."""
    try:
        return ask_millis(device) / 1e3
    except failure as error:
        raise PowerReadingError(f"NVML: {error}") from None


def open_nvidia_smi(uuid: str, environ: Mapping[str, str]) -> PowerSource:
    """The GPU's power.

    Raises:
        NoPowerSource: there is no nvidia-smi, or it does not know the GPU's power.
    """
    path = find_command("nvidia-smi", environ)
    command = (path, "-i", uuid, "--query-gpu=power.draw", "--format=csv")
    source = power_tool(f"nvidia-smi, power.draw of {uuid}", command, _watts)
    try:
        source.read()
    except PowerReadingError as error:
        raise NoPowerSource(f"{error}.") from None
    return source


def _watts(text: str) -> float:
    watts = parse_power_draw(text)
    if watts is None:
        raise PowerReadingError(f"nvidia-smi: no power.draw in {' '.join(text.split())[:200]}")
    return watts


def parse_power_draw(text: str) -> float | None:
    """Watts from `nvidia-smi --query-gpu=power.draw --format=csv` for one GPU.

    A line `power.draw [W]`, then `67.58 W`; `[N/A]` or `[Not Supported]` where it is not known.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("power.draw")]
    return number(lines[0]) if len(lines) == 1 else None
