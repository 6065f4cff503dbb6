"""What is publicly known of devices: memory, arithmetic, bandwidths, each with its source.

Figures are peaks, one direction, decimal units. Nothing here was measured by this project. Where
the vendor gives no figure in public it is computed or taken from others, and the source says so.
`Rates` are what training reaches of the peaks: constants of the model of a step's time, fitted to
measurements that others have published, a set for each family of devices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qwen2_ascend.errors import UserError

GB, TERA = 10**9, 10**12


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What of a device's peaks a training step reaches, and what the host adds."""

    products: float
    """Share of the peak that matrix products reach."""
    attention: float
    """Share of the peak that attention's core reaches."""
    memory: float
    """Share of the memory's bandwidth that all else reaches, by the bytes that it has to move."""
    links: float
    """Share of the links' bandwidth that collectives reach."""
    layer_seconds: float
    """What each layer and micro-batch adds, both ways: launches, waits, small kernels."""
    step_seconds: float
    """What each step adds."""
    source: str


MC2_SHARE = 0.5
"""The part of tensor parallelism's traffic that MC2 and COC leave to wait for; fitted with the
others, between 0.3 and 0.7 it makes no difference that the measurements show."""
_FITTED = "fitted to {} published steps of megatron-core ({}; docs/planning.md)"
ASCEND = Rates(
    products=0.964,
    attention=0.327,
    memory=0.331,
    links=0.689,
    layer_seconds=2.45e-3,
    step_seconds=33.3e-3,
    source=_FITTED.format(37, "0.5B to 110B on 1 to 64 cards called 910B"),
)
GPU = Rates(
    products=0.568,
    attention=0.313,
    memory=0.412,
    links=0.819,
    layer_seconds=1.32e-3,
    step_seconds=27.4e-3,
    source=_FITTED.format(25, "24 of them on 8 B200, one on 8 A800"),
)
GUESSED = Rates(
    products=0.5,
    attention=0.5,
    memory=0.7,
    links=0.7,
    layer_seconds=0.0,
    step_seconds=0.0,
    source="assumptions",
)


@dataclass(frozen=True, kw_only=True)
class Device:
    """One card, as torch sees it: of an Ascend 910C each of its two dies is a device."""

    name: str
    memory: int
    """Bytes."""
    peak_flops: float
    """bf16 multiply-adds per second, counted as two."""
    memory_bandwidth: float
    """Bytes per second of its own memory."""
    node_bandwidth: float
    """Bytes per second to all other devices of a node together, one direction."""
    network_bandwidth: float
    """Bytes per second to other nodes, one direction."""
    devices_per_node: int
    backend: str
    """cpu, cuda or npu."""
    source: str
    is_mesh: bool = False
    """Whether each two devices of a node have a link of their own: fewer devices use fewer. Else a
    switch gives any group all."""
    rates: Rates = GUESSED
    assumed: tuple[str, ...] = ()
    """Fields that stand for this device on no figure of its own."""

    def link(self, num_ranks: int, span: int, devices_per_node: int) -> float:
        """Bytes per second that a rank can send in a collective, one direction.

        Args:
            num_ranks: ranks that take part.
            span: devices from the first of them to the last.
            devices_per_node: with fast links to each other.
        """
        if span > devices_per_node:
            return self.network_bandwidth
        if not self.is_mesh:
            return self.node_bandwidth
        return self.node_bandwidth * (num_ranks - 1) / (devices_per_node - 1)


_ASCEND: dict[str, Any] = {
    "memory_bandwidth": 1.6e12,
    "node_bandwidth": 196e9,
    "network_bandwidth": 25e9,
    "backend": "npu",
    "rates": ASCEND,
}
_NVIDIA: dict[str, Any] = {"devices_per_node": 8, "backend": "cuda", "rates": GPU}
_910B_SOURCE = (
    "memory and peak ({cores} cores x 4096 multiply-adds x {ghz} GHz): CANN's "
    "platform_config/Ascend{name}.ini; bandwidths: Ascend/msmodeling's tensor_cast/device.py, and "
    "7 links of 28 GB/s in a node by CANN hccl's Mesh.md"
)


def _ascend_910b(name: str, cores: int, ghz: float, gib: int) -> Device:
    return Device(
        name=name,
        memory=gib * 2**30,
        peak_flops=cores * 4096 * 2 * ghz * 1e9,
        devices_per_node=8,
        source=_910B_SOURCE.format(name=name, cores=cores, ghz=ghz),
        is_mesh=True,
        **_ASCEND,
    )


_A100 = Device(
    name="A100",
    memory=80 * GB,
    peak_flops=312e12,
    memory_bandwidth=2.039e12,
    node_bandwidth=300e9,
    network_bandwidth=25e9,
    source="NVIDIA A100 80GB SXM data sheet; network: DGX A100, 200 Gb/s per GPU",
    **_NVIDIA,
)
_LIST = (
    _ascend_910b("910B1", 24, 1.85, 64),
    _ascend_910b("910B2", 24, 1.8, 64),
    _ascend_910b("910B3", 20, 1.8, 64),
    _ascend_910b("910B4", 20, 1.5, 32),
    Device(
        name="910C",
        memory=64 * 2**30,
        peak_flops=376e12,
        devices_per_node=16,
        source="one of two dies: Zuo et al. 2025, arXiv:2506.12708 (CloudMatrix384); memory: "
        "CANN's platform_config/Ascend910_9391.ini",
        **_ASCEND,
    ),
    _A100,
    replace(
        _A100,
        name="A100-40GB",
        memory=40 * GB,
        memory_bandwidth=1.555e12,
        source="NVIDIA A100 40GB SXM data sheet; network: DGX A100, 200 Gb/s per GPU",
    ),
    Device(
        name="H100",
        memory=80 * GB,
        peak_flops=989e12,
        memory_bandwidth=3.35e12,
        node_bandwidth=450e9,
        network_bandwidth=50e9,
        source="NVIDIA H100 SXM data sheet; network: DGX H100, 400 Gb/s per GPU",
        **_NVIDIA,
    ),
    Device(
        name="B200",
        memory=180 * GB,
        peak_flops=2250e12,
        memory_bandwidth=8e12,
        node_bandwidth=900e9,
        network_bandwidth=50e9,
        source="NVIDIA DGX B200 data sheet (dense bf16); network: 400 Gb/s per GPU",
        **_NVIDIA,
    ),
    Device(
        name="CPU",
        memory=16 * GB,
        peak_flops=0.1e12,
        memory_bandwidth=20e9,
        node_bandwidth=5e9,
        network_bandwidth=1.25e9,
        devices_per_node=4,
        backend="cpu",
        source="no product: round numbers for one process on a few cores; give your own",
        assumed=("memory", "peak_flops", "memory_bandwidth", "node_bandwidth", "network_bandwidth"),
    ),
)
DEVICES = {device.name: device for device in _LIST}
ALIASES = {"910B": "910B2", "910_9391": "910C", "910_9392": "910C", "A100-80GB": "A100"}
"""910B is taken as the bin whose peak the published measurements of "910B" need; 910_93 and two
digits is what a 910C calls itself."""


def find_device(name: str, flag: str = "--device") -> Device:
    """The device of that name, ours or its driver's, whatever its case; `flag` has said it.

    Raises:
        UserError: there is none.
    """
    if (found := DEVICES.get(ALIASES.get(_bare(name), _bare(name))) or device_called(name)) is None:
        raise UserError(
            f"{flag} {name} is not known; known are {', '.join([*ALIASES, *DEVICES])}. For "
            "another give the nearest, with --memory-gb, --peak-tflops and so on."
        )
    return found


def device_called(name: str) -> Device | None:
    """The device that a driver names so, as "Ascend910B3" or "NVIDIA A100-SXM4-80GB"; None for one
    that is not known, or not for certain ("Ascend910B")."""
    words = name.upper().replace("-", " ").split()
    if known := [key for key in DEVICES if key in words]:
        return DEVICES.get(f"{known[0]}-40GB" if "40GB" in words else known[0])
    bare = _bare(name)
    return DEVICES.get(ALIASES[bare] if bare in ALIASES and bare.startswith("910_") else bare)


def _bare(name: str) -> str:
    """A device's name as the tables have it: in capitals, without who makes it."""
    return name.upper().removeprefix("ASCEND").strip(" -_")
