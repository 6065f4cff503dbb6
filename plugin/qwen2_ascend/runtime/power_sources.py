"""Which source of power a device has: the first of its kinds that answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qwen2_ascend.runtime import power_npu_smi, power_nvidia, power_rapl
from qwen2_ascend.runtime.power import NoPowerSource, Place, PowerSource


def find_power_source(
    place: Place, *, root: Path = Path("/"), environ: Mapping[str, str] = os.environ
) -> PowerSource:
    """The best source that measures a device: one that counts energy before one that says power.

    Args:
        place: the device.
        root: where /sys is.
        environ: for PATH and for which devices are visible.

    Raises:
        NoPowerSource: there is none; with what was looked for and why each did not do.
    """
    if place.simulated:
        raise NoPowerSource("the device is simulated: it draws no power.")
    attempts: dict[str, Sequence[Callable[[], PowerSource]]] = {
        "cpu": [lambda: power_rapl.open_rapl(place.local_rank, root)],
        "npu": [lambda: power_npu_smi.open_npu_smi(place.local_rank, environ)],
        "cuda": [
            lambda: power_nvidia.open_nvml(place.uuid()),
            lambda: power_nvidia.open_nvidia_smi(place.uuid(), environ),
        ],
    }
    reasons = []
    for attempt in attempts[place.device]:
        try:
            return attempt()
        except NoPowerSource as reason:
            reasons.append(str(reason))
    raise NoPowerSource(" ".join(reasons))
