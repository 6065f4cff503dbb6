"""RAPL: the energy counters of Intel and AMD processors, as Linux's powercap shows them.

`/sys/class/powercap/intel-rapl:N` are the domains, AMD's too. Counted are the packages alone:
core, uncore and dram (`intel-rapl:N:M`) are parts of a package or of other rails, psys is the whole
platform, and `intel-rapl-mmio:N` is a package seen a second time. A counter starts again at zero
after `max_energy_range_uj`. (Linux, Documentation/power/powercap/powercap.rst.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen2_ascend.runtime.power import (
    NoPowerSource,
    PowerReadingError,
    PowerSource,
    counted_elsewhere,
)

POWERCAP = Path("sys/class/powercap")
MOST_WATTS = 1000.0
"""No package draws more: what it cannot have counted between two readings."""


@dataclass
class PackageDomain:
    """One processor package."""

    folder: Path
    name: str
    """The package's name, such as package-0."""
    range_joules: float
    """Where the counter starts again."""
    _last: float | None = None
    _total: float = 0.0

    def joules(self, seconds_since_last: float) -> float:
        """Joules since the first call, over the counter's ends.

        Raises:
            PowerReadingError: it cannot be read, or may have come round more than once.
        """
        try:
            now = int((self.folder / "energy_uj").read_text(encoding="ascii")) / 1e6
        except (OSError, ValueError) as error:
            raise PowerReadingError(f"RAPL: {self.folder / 'energy_uj'}: {error}") from None
        if self._last is not None:
            if seconds_since_last * MOST_WATTS >= self.range_joules:
                raise PowerReadingError(
                    f"RAPL: {seconds_since_last:.0f} s between two readings of {self.name}, in "
                    f"which its counter of {self.range_joules:.0f} J may have come round."
                )
            step = now - self._last
            self._total += step if step >= 0 else step + self.range_joules
        self._last = now
        return self._total


@dataclass
class Rapl:
    """All packages of the host."""

    domains: Sequence[PackageDomain]
    clock: Callable[[], float] = time.monotonic
    _read_at: float | None = None

    def read(self) -> float:
        """Joules of all packages since the first call."""
        now = self.clock()
        since = 0.0 if self._read_at is None else now - self._read_at
        total = sum(domain.joules(since) for domain in self.domains)
        self._read_at = now
        return total


def open_rapl(local_rank: int, root: Path = Path("/")) -> PowerSource:
    """The host's packages, counted by its first process.

    Raises:
        NoPowerSource: there are none, or they cannot be read.
    """
    domains = packages(root / POWERCAP)
    if local_rank > 0:
        return counted_elsewhere("RAPL, counted by local rank 0")
    rapl = Rapl(domains)
    try:
        rapl.read()
    except PowerReadingError as error:
        way_out = ""
        if "Permission denied" in str(error):
            way_out = f" Linux lets root alone read it; as root: chmod a+r /{POWERCAP}"
            way_out += "/intel-rapl:*/energy_uj"
        raise NoPowerSource(f"{error}{way_out}.") from None
    names = ", ".join(domain.name for domain in domains)
    return PowerSource(
        name=f"RAPL, {names} (the whole host's)",
        read=rapl.read,
        counts_energy=True,
        period_seconds=0.5,
    )


def packages(folder: Path) -> list[PackageDomain]:
    """The packages that powercap's folder shows.

    Raises:
        NoPowerSource: there are none, or they cannot be read.
    """
    if not folder.is_dir():
        raise NoPowerSource(
            "RAPL: /sys/class/powercap is not there (a virtual machine, a container without it, "
            "or a processor that is neither Intel's nor AMD's)."
        )
    for control in ("intel-rapl", "intel-rapl-mmio"):
        if found := [
            domain
            for zone in sorted(folder.glob(f"{control}:*"))
            if zone.name.count(":") == 1 and (domain := _package(zone)) is not None
        ]:
            return found
    raise NoPowerSource(
        "RAPL: /sys/class/powercap has no package domain (a virtual machine, or the kernel's "
        "intel_rapl_msr driver is not loaded)."
    )


def _package(zone: Path) -> PackageDomain | None:
    """None for what is not a package."""
    try:
        name = (zone / "name").read_text(encoding="ascii").strip()
        if not name.startswith("package"):
            return None
        largest = int((zone / "max_energy_range_uj").read_text(encoding="ascii")) / 1e6
    except (OSError, ValueError) as error:
        raise NoPowerSource(f"RAPL: {zone}: {error}.") from None
    if largest <= 0:
        raise NoPowerSource(f"RAPL: {zone}/max_energy_range_uj is not above zero.")
    return PackageDomain(folder=zone, name=name, range_joules=largest)
