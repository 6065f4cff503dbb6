"""Sources of energy and power: what they count, what they leave out, and how they refuse."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from qwen2_ascend.runtime import power
from qwen2_ascend.runtime.power import NoPowerSource, Place, PowerReadingError
from qwen2_ascend.runtime.power_nvidia import open_nvidia_smi, open_nvml, parse_power_draw
from qwen2_ascend.runtime.power_rapl import POWERCAP, Rapl, open_rapl, packages
from qwen2_ascend.runtime.power_sources import find_power_source

RANGE_UJ = 262_143_328_850


class Powercap:
    """A /sys/class/powercap."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def zone(self, folder: str, name: str, micro_joules: int) -> None:
        path = self.root / POWERCAP / folder
        path.mkdir(parents=True, exist_ok=True)
        (path / "name").write_text(f"{name}\n", encoding="ascii")
        (path / "energy_uj").write_text(f"{micro_joules}\n", encoding="ascii")
        (path / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n", encoding="ascii")


@pytest.fixture
def powercap(tmp_path: Path) -> Powercap:
    """Two packages with their parts, the platform, and a package's second face."""
    found = Powercap(tmp_path)
    (tmp_path / POWERCAP / "intel-rapl").mkdir(parents=True)
    for folder, name in (
        ("intel-rapl:0", "package-0"),
        ("intel-rapl:1", "package-1"),
        ("intel-rapl:2", "psys"),
        ("intel-rapl:0:0", "core"),
        ("intel-rapl:0:1", "dram"),
        ("intel-rapl-mmio:0", "package-0"),
    ):
        found.zone(folder, name, 1_000_000)
    return found


def test_rapl_counts_each_package_once_and_nothing_else(powercap: Powercap) -> None:
    source = open_rapl(0, powercap.root)
    assert source.name == "RAPL, package-0, package-1 (the whole host's)"
    powercap.zone("intel-rapl:0", "package-0", 3_500_000)
    powercap.zone("intel-rapl:1", "package-1", 1_250_000)
    for other in ("intel-rapl:2", "intel-rapl:0:0", "intel-rapl:0:1", "intel-rapl-mmio:0"):
        (powercap.root / POWERCAP / other / "energy_uj").write_text("999000000", encoding="ascii")
    assert source.counts_energy and source.read() == pytest.approx(2.75)


def test_rapl_counters_come_round(powercap: Powercap) -> None:
    powercap.zone("intel-rapl:0", "package-0", RANGE_UJ - 2_000_000)
    source = open_rapl(0, powercap.root)
    powercap.zone("intel-rapl:0", "package-0", 5_000_000)
    assert source.read() == pytest.approx(7.0)
    powercap.zone("intel-rapl:0", "package-0", 6_000_000)
    assert source.read() == pytest.approx(8.0)


def test_rapl_does_not_guess_how_often_a_counter_came_round(powercap: Powercap) -> None:
    moments = iter((0.0, 200.0, 500.0))
    rapl = Rapl(packages(powercap.root / POWERCAP), clock=lambda: next(moments))
    rapl.read()
    rapl.read()
    with pytest.raises(PowerReadingError, match="300 s between two readings of package-0"):
        rapl.read()


def test_the_memory_mapped_face_counts_where_it_is_the_only_one(tmp_path: Path) -> None:
    powercap = Powercap(tmp_path)
    powercap.zone("intel-rapl-mmio:0", "package-0", 0)
    source = open_rapl(0, tmp_path)
    powercap.zone("intel-rapl-mmio:0", "package-0", 4_000_000)
    assert source.read() == 4.0


def test_one_process_counts_the_host(powercap: Powercap) -> None:
    other = open_rapl(1, powercap.root)
    powercap.zone("intel-rapl:0", "package-0", 9_000_000)
    assert (other.read(), other.counts_energy) == (0.0, True)
    assert other.name == "RAPL, counted by local rank 0"


def test_rapl_refuses_in_words(
    powercap: Powercap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NoPowerSource, match="/sys/class/powercap is not there"):
        open_rapl(0, tmp_path / "elsewhere")
    only_parts = Powercap(tmp_path / "parts")
    only_parts.zone("intel-rapl:0", "psys", 0)
    with pytest.raises(NoPowerSource, match="has no package domain"):
        open_rapl(0, only_parts.root)
    real = Path.read_text

    def for_root_alone(path: Path, **options) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **options)

    monkeypatch.setattr(Path, "read_text", for_root_alone)
    with pytest.raises(NoPowerSource, match=r"Permission denied.*chmod a\+r /sys/class/powercap/"):
        open_rapl(0, powercap.root)


class FakeNvml(types.ModuleType):
    """nvidia-ml-py, as far as it is called."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, millijoules: list[int] | None, milliwatts: list[int] | None) -> None:
        super().__init__("pynvml")
        self._answers = {"energy": millijoules, "power": milliwatts}

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "GPU-1":
            raise self.NVMLError("Not Found")
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        return self._answer("energy", handle)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return self._answer("power", handle)

    def _answer(self, what: str, handle: str) -> int:
        assert handle == "handle"
        answers = self._answers[what]
        if not answers:
            raise self.NVMLError("Not Supported")
        return answers.pop(0)


def install(monkeypatch: pytest.MonkeyPatch, nvml: types.ModuleType | None) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)


def test_nvml_counts_energy_where_the_gpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvml(millijoules=[500, 12_500], milliwatts=[70_000]))
    source = open_nvml("GPU-1")
    assert (source.counts_energy, source.read()) == (True, 12.5)
    with pytest.raises(PowerReadingError, match="NVML: Not Supported"):
        source.read()


def test_nvml_says_power_where_the_gpu_has_no_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvml(millijoules=None, milliwatts=[70_000, 71_500]))
    source = open_nvml("GPU-1")
    assert (source.counts_energy, source.read()) == (False, 71.5)
    assert source.name == "NVML, power of GPU-1"


def test_nvml_refuses_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvml(millijoules=None, milliwatts=None))
    with pytest.raises(NoPowerSource, match=r"no energy counter \(.*\) and no power \(.*Supported"):
        open_nvml("GPU-1")
    with pytest.raises(NoPowerSource, match="GPU-2: Not Found"):
        open_nvml("GPU-2")
    install(monkeypatch, None)
    with pytest.raises(
        NoPowerSource, match=r"nvidia-ml-py is not installed .*qwen2-ascend\[energy"
    ):
        open_nvml("GPU-1")


def test_the_genuine_nvidia_ml_py_is_called_by_its_names() -> None:
    """Without a driver it refuses in NVML's own words."""
    pytest.importorskip("pynvml")
    with pytest.raises(NoPowerSource, match=r"NVML: GPU-1: |NVML: "):
        open_nvml("GPU-1")


@pytest.mark.parametrize(
    ("text", "watts"),
    [
        ("power.draw [W]\n67.58 W\n", 67.58),
        ("67.58\n", 67.58),
        ("power.draw [W]\n[N/A]\n", None),
        ("power.draw [W]\n[Not Supported]\n", None),
        ("power.draw [W]\n[Unknown Error]\n", None),
        ("power.draw [W]\n60.00 W\n70.00 W\n", None),
        ("No devices were found\n", None),
        ("", None),
    ],
)
def test_power_draw_of_one_gpu(text: str, watts: float | None) -> None:
    assert parse_power_draw(text) == watts


def put_nvidia_smi(folder: Path, text: str) -> dict[str, str]:
    script = folder / "nvidia-smi"
    script.write_text(
        f'#!/bin/sh\ntest "$*" = "-i GPU-1 --query-gpu=power.draw --format=csv" || exit 6\n'
        f"printf '{text}'\n",
        encoding="utf-8",
    )
    script.chmod(0o755)
    return {"PATH": str(folder)}


def test_nvidia_smi_takes_the_place_of_nvml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, None)
    environ = put_nvidia_smi(tmp_path, "power.draw [W]\\n67.58 W\\n")
    place = Place(device="cuda", uuid=lambda: "GPU-1")
    source = find_power_source(place, environ=environ)
    assert (source.name, source.read()) == ("nvidia-smi, power.draw of GPU-1", 67.58)
    put_nvidia_smi(tmp_path, "power.draw [W]\\n[N/A]\\n")
    with pytest.raises(NoPowerSource) as refusal:
        find_power_source(place, environ=environ)
    assert "NVML: nvidia-ml-py is not installed" in str(refusal.value), "each attempt is told"
    assert "nvidia-smi: no power.draw in power.draw [W] [N/A]" in str(refusal.value)
    with pytest.raises(NoPowerSource, match="ended with 6"):
        open_nvidia_smi("GPU-2", environ)


def test_a_tool_that_hangs_counts_as_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(power, "COMMAND_SECONDS", 0.2)
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\nexec sleep 60\n", encoding="utf-8")
    script.chmod(0o755)
    with pytest.raises(PowerReadingError, match=r"`nvidia-smi -L` took longer than 0.2 s"):
        power.ask((str(script), "-L"))


def test_a_simulated_device_has_no_power_source(powercap: Powercap) -> None:
    with pytest.raises(NoPowerSource, match="simulated: it draws no power"):
        find_power_source(Place(device="npu", simulated=True), root=powercap.root)
    assert find_power_source(Place(device="cpu"), root=powercap.root).counts_energy
