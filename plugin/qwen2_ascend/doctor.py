"""`qwen2-ascend doctor`: what is installed, which devices there are, and what is wrong with them.

It is made for broken installations. So nothing is imported here but the standard library and this
package's own tables: packages are looked up by their metadata, and what has to be imported is
imported in a process of its own, whose crash is a finding. Every finding that is a problem says the
way out.
"""

from __future__ import annotations

import argparse
import glob
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qwen2_ascend.runtime import diagnosis, environment, mindspeed
from qwen2_ascend.runtime.mindspeed import release as _release

OPTIONAL_PACKAGES = (
    "torch_npu",
    "mindspeed",
    "megatron_adaptor",
    "pyarrow",
    "matplotlib",
    "tensorboard",
    "datasets",
)

SMALL_SHM_BYTES = 512 * 2**20
SMALL_OPEN_FILES = 4096
PROBE_SECONDS = 120


class Finding(NamedTuple):
    """One line of the report."""

    name: str
    level: Literal["ok", "note", "problem"]
    text: str
    way_out: str = ""


def ok(name: str, text: str) -> Finding:
    """All is well."""
    return Finding(name, "ok", text)


def note(name: str, text: str, way_out: str = "") -> Finding:
    """Worth knowing; does not stop anything."""
    return Finding(name, "note", text, way_out)


def problem(name: str, text: str, way_out: str) -> Finding:
    """Something will not work."""
    return Finding(name, "problem", text, way_out)


@dataclass(frozen=True)
class Machine:
    """What the checks look at; tests give another root and another environment."""

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    python: str = sys.executable

    def file(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def read(self, path: str) -> str:
        """A file's text, empty when it cannot be read."""
        try:
            return self.file(path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def probe(self, code: str) -> Probe:
        """Runs Python `code` in a process of its own; it prints one line of JSON at its end."""
        try:
            done = subprocess.run(
                [self.python, "-W", "ignore", "-c", _NOT_FROM_HERE + code],
                env=dict(self.environ),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=PROBE_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return Probe({}, f"gave no answer in {PROBE_SECONDS} seconds")
        except OSError as error:
            return Probe({}, str(error))
        if done.returncode < 0:
            return Probe({}, f"crashed ({signal.Signals(-done.returncode).name})")
        try:
            return Probe(json.loads(done.stdout.splitlines()[-1]), None)
        except (IndexError, ValueError):
            return Probe({}, _last_line(done.stderr) or f"exit status {done.returncode}")

    @cached_property
    def sys_path(self) -> list[str]:
        """Where this Python looks for modules, in this environment."""
        found = self.probe("import sys, json; print(json.dumps(sys.path))")
        return sys.path if found.error else list(found.answer)

    def versions(self, package: str) -> list[tuple[str, str]]:
        """(version, folder) of every installation of `package`, the one that counts first."""
        wanted = _normalized(package)
        found = {}
        for distribution in importlib.metadata.distributions(path=self.sys_path):
            name = distribution.metadata["Name"] or ""
            if _normalized(name) == wanted:
                folder = str(distribution.locate_file(""))
                found.setdefault(os.path.realpath(folder), (distribution.version, folder))
        return list(found.values())

    def version(self, package: str) -> str | None:
        """Version of the installation that counts, None when there is none."""
        return next((version for version, _ in self.versions(package)), None)

    @cached_property
    def davinci_devices(self) -> list[str]:
        pattern = str(self.file("/dev/davinci[0-9]*"))
        return sorted(glob.glob(pattern), key=lambda path: (len(path), path))

    @cached_property
    def torch(self) -> Probe:
        return self.probe(_TORCH)

    @cached_property
    def megatron(self) -> Probe:
        return self.probe(_MEGATRON)


class Probe(NamedTuple):
    """The answer of a separate process, or why there is none."""

    answer: Any
    error: str | None


# -c puts the current folder first, where a script would have its own
_NOT_FROM_HERE = """
import sys
if sys.path and sys.path[0] == "":
    del sys.path[0]
"""

_TORCH = """
import json, torch
print(json.dumps(dict(version=torch.__version__, cuda=torch.version.cuda, file=torch.__file__,
                      cuda_available=torch.cuda.is_available())))
"""

_TORCH_NPU = """
import json, torch, torch_npu
print(json.dumps(dict(count=torch.npu.device_count(), available=torch.npu.is_available(),
                      names=[torch.npu.get_device_name(i) for i in range(torch.npu.device_count())]
                      )))
"""

# Where things would come from is asked without importing them; the parents are namespaces.
_MEGATRON = """
import importlib.util, json, os, runpy
def where(name):
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    return spec.origin or next(iter(spec.submodule_search_locations or []), None)
core = where("megatron.core")
version = None
if core:
    info = os.path.join(os.path.dirname(core), "package_info.py")
    if os.path.exists(info):
        version = runpy.run_path(info).get("__version__", "").partition("+")[0] or None
def folder(name):
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or []) if spec else []
    return places[0] if places else None
print(json.dumps(dict(core=core, version=version, training=where("megatron.training"),
    mindspeed=folder("mindspeed"), adaptor=folder("megatron_adaptor"),
    transformer_engine=folder("transformer_engine") is not None,
    missing=[name for name in ("einops", "scipy", "triton")
             if importlib.util.find_spec(name) is None])))
"""

# As a run imports it: a triton that is missing is no fault. This package comes last on the path.
_LEND_TRITON = f"""
sys.path.append({str(Path(__file__).parents[1])!r})
from qwen2_ascend.runtime import absent_triton
absent_triton.lend()
"""

_IMPORT_MEGATRON = f"""
import importlib.util, json, sys
{_LEND_TRITON}
import megatron.core
lent = [name for name in absent_triton.BORROWERS if name in sys.modules]
print(json.dumps(bool(lent) and importlib.util.find_spec("triton") is None))
"""

_HELPERS = f"""
import importlib.util, json, sys
{_LEND_TRITON}
import megatron.core.datasets
spec = importlib.util.find_spec("megatron.core.datasets.helpers_cpp")
print(json.dumps(spec.origin if spec else None))
"""


# --- checks ---------------------------------------------------------------------------------------


def _python(machine: Machine) -> Iterator[Finding]:
    version = platform.python_version()
    text = f"{version} ({machine.python}), {platform.system()} {platform.machine()}"
    supported = _supported_pythons()
    place, oldest, newest = (_numbers(v) for v in (version, supported[0], supported[-1]))
    span = f"{supported[0]} to {supported[-1]}"
    if place < oldest:
        yield problem("python", f"{text}; too old", f"use Python {span}.")
    elif place > newest:
        yield note("python", f"{text}; not tested, {span} are")
    else:
        yield ok("python", text)


def _packages(machine: Machine) -> Iterator[Finding]:
    required = _requirements()
    for name, specifier in required.items():
        yield from _package(machine, name, specifier)
    for name in OPTIONAL_PACKAGES:
        if machine.version(name) is not None:
            yield from _package(machine, name, "")


def _package(machine: Machine, name: str, specifier: str) -> Iterator[Finding]:
    wanted = f"{name}{specifier}"
    found = machine.versions(name)
    if not found:
        yield problem(name, "is not installed", f'pip install "{wanted}"')
        return
    version, folder = found[0]
    if specifier and not _fits(version, specifier):
        yield problem(name, f"{version} does not fit {specifier}", f'pip install "{wanted}"')
    elif len(found) > 1:
        others = ", ".join(f"{v} in {where}" for v, where in found[1:])
        yield note(
            name, f"{version} in {folder} hides {others}", "remove the one that is not meant."
        )
    else:
        yield ok(name, version)


def _torch_import(machine: Machine) -> Iterator[Finding]:
    if machine.version("torch") is None:
        return
    torch = machine.torch
    if torch.error:
        yield problem("import torch", torch.error, _torch_way_out(torch.error))
        return
    cuda = torch.answer["cuda"]
    if cuda and not torch.answer["cuda_available"]:
        yield note(
            "import torch",
            f"a CUDA {cuda} build and no CUDA device; it works on the CPU, and is GBs too large",
            _cpu_build(torch.answer["version"]),
        )
    else:
        yield ok("import torch", f"works{f', CUDA {cuda}' if cuda else ', CPU build'}")


def _cpu_build(version: str) -> str:
    return (
        f'install the CPU build: pip install "torch=={_release(version)}" --index-url '
        "https://download.pytorch.org/whl/cpu"
    )


def _torch_way_out(error: str) -> str:
    if "numpy" in error.lower():
        return "install a numpy that this torch was built for."
    return "install torch again: pip install --force-reinstall torch"


def _torch_npu(machine: Machine) -> Iterator[Finding]:
    ours, theirs = machine.version("torch"), machine.version("torch_npu")
    has_devices = bool(machine.davinci_devices)
    if theirs is None:
        if has_devices:
            release = _release(ours) if ours else "the release of torch"
            yield problem(
                "torch_npu",
                "is not installed, and this machine has NPUs; everything would run on the CPU",
                f'pip install "torch_npu=={release}" (both releases must be equal)',
            )
        else:
            yield note("torch_npu", "is not installed; runs on the CPU")
        return
    if ours is not None and _release(ours) != _release(theirs):
        yield problem(
            "torch_npu",
            f"{theirs} is for torch {_release(theirs)}, torch is {ours}",
            f'pip install "torch=={_release(theirs)}", or the torch_npu of {_release(ours)}',
        )
        return
    probe = machine.probe(_TORCH_NPU)
    if probe.error:
        why = diagnosis.import_fault(probe.error, machine.environ, machine.root)
        if probe.error.startswith("crashed") and machine.torch.answer.get("cuda"):
            # both register allocator settings of the same names, which ends the process
            why = f"torch_npu and torch's CUDA build cannot be together; {_cpu_build(ours or '')}"
        yield problem("import torch_npu", probe.error, why)
    elif not probe.answer["count"]:
        why = diagnosis.no_device_fault(machine.environ, machine.root)
        yield problem("import torch_npu", "works, and sees no device", why)
    else:
        names = sorted(set(probe.answer["names"]))
        yield ok("import torch_npu", f"sees {probe.answer['count']} x {', '.join(names)}")


def _npu_devices(machine: Machine) -> Iterator[Finding]:
    devices = machine.davinci_devices
    if not devices:
        yield note("NPU devices", "none (/dev/davinci*)")
    elif denied := [path for path in devices if not os.access(path, os.R_OK | os.W_OK)]:
        yield problem(
            "NPU devices",
            f"{len(denied)} of {len(devices)} may not be opened by this user ({denied[0]})",
            "join the group that owns them: usermod -a -G HwHiAiUser $USER, and log in again.",
        )
    else:
        yield ok("NPU devices", f"{len(devices)} (/dev/davinci*)")
    if devices and not machine.file("/dev/davinci_manager").exists():
        yield problem(
            "NPU devices",
            "/dev/davinci_manager is missing",
            "give it to the container: --device /dev/davinci_manager --device "
            "/dev/devmm_svm --device /dev/hisi_hdc",
        )
    visible = machine.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    if fault := diagnosis.visible_devices_fault(machine.environ, len(devices) or None):
        name, _, rest = fault.partition(": ")
        yield problem("NPU devices", f"{name} is wrong", rest)
    elif visible is not None:
        yield note("NPU devices", f"ASCEND_RT_VISIBLE_DEVICES={visible} hides the others")


def _npu_smi(machine: Machine) -> Iterator[Finding]:
    program = shutil.which("npu-smi", path=machine.environ.get("PATH"))
    if program is None:
        if machine.davinci_devices:
            yield note(
                "npu-smi", "is not on PATH; power cannot be measured", "add the driver's tools."
            )
        return
    try:
        done = subprocess.run(
            [program, "info"],
            env=dict(machine.environ),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
        )
    except subprocess.TimeoutExpired:
        yield problem("npu-smi", "hangs", "the driver does not answer; look at dmesg.")
        return
    if done.returncode:
        text = _last_line(done.stderr) or _last_line(done.stdout) or "no message"
        yield problem(
            "npu-smi", f"fails: {text}", "the driver is not loaded, or not for this kernel."
        )
        return
    version = re.search(r"Version:\s*([\w.]+)", done.stdout)
    yield ok("npu-smi", f"works{f', driver {version[1]}' if version else ''}")


def _cann(machine: Machine) -> Iterator[Finding]:
    home = machine.environ.get("ASCEND_HOME_PATH") or machine.environ.get("ASCEND_TOOLKIT_HOME")
    needed = bool(machine.davinci_devices) or machine.version("torch_npu") is not None
    scripts = diagnosis.set_env_scripts(machine.environ, machine.root)
    if home is None:
        if needed or scripts:
            way_out = f"run: source {scripts[0]}" if scripts else "install CANN."
            level = problem if needed else note
            yield level("CANN", "ASCEND_HOME_PATH is not set; set_env.sh was not sourced", way_out)
        return
    if not machine.file(home).is_dir():
        yield problem("CANN", f"ASCEND_HOME_PATH={home} does not exist", "source set_env.sh again.")
        return
    version = re.search(r"^version=(\S+)", _install_info(machine, home), re.MULTILINE)
    yield ok("CANN", f"{version[1] if version else 'version unknown'} in {home}")


def _install_info(machine: Machine, home: str) -> str:
    return "".join(
        machine.read(f"{home}/{folder}ascend_toolkit_install.info")
        for folder in ("", "aarch64-linux/", "x86_64-linux/")
    )


def _megatron(machine: Machine) -> Iterator[Finding]:
    found = machine.megatron
    if found.error:
        yield problem("megatron", found.error, "pip install --force-reinstall megatron-core")
        return
    core, version = found.answer["core"], found.answer["version"]
    if core is None:
        if machine.version("megatron-core") is not None:
            yield problem(
                "megatron.core",
                "is not found, though megatron-core is installed: another `megatron` hides it",
                "look for a folder or package named megatron on PYTHONPATH.",
            )
        return
    installed = machine.version("megatron-core")
    places = [f"{folder}/megatron/core" for _, folder in machine.versions("megatron-core")]
    inside = os.path.realpath(os.path.dirname(core)) in map(os.path.realpath, places)
    if inside or installed is None:
        yield ok("megatron.core", f"{version} from {os.path.dirname(core)}")
    elif version == installed:
        yield note(
            "megatron.core",
            f"comes from {os.path.dirname(core)}, not from pip's megatron-core of the same version",
        )
    else:
        yield problem(
            "megatron.core",
            f"{version} in {os.path.dirname(core)} hides pip's megatron-core {installed}",
            "take that folder off PYTHONPATH, or install the megatron-core of its version.",
        )
    if found.answer["training"]:
        where = os.path.dirname(found.answer["training"])
        yield note("megatron.training", f"found in {where}; MindSpeed uses it, this project not")
    imported = machine.probe(_IMPORT_MEGATRON)
    if imported.error:
        yield problem(
            "import megatron.core",
            imported.error,
            "install a megatron-core that fits torch, or see the line on torch.",
        )
    else:
        lent = "; triton is not installed, and nothing here uses it" if imported.answer else ""
        yield ok("import megatron.core", f"works{lent}")
        yield from _helpers_cpp(machine)


def _helpers_cpp(machine: Machine) -> Iterator[Finding]:
    found = machine.probe(_HELPERS)
    if found.error:
        yield problem("helpers_cpp", found.error, "pip install --force-reinstall megatron-core")
    elif found.answer:
        yield ok("helpers_cpp", "compiled")
    elif compiler := shutil.which(
        machine.environ.get("CXX", "c++"), path=machine.environ.get("PATH")
    ):
        yield note("helpers_cpp", f"is not compiled; {compiler} will do it when data is first read")
    else:
        yield problem(
            "helpers_cpp",
            "is not compiled and there is no C++ compiler; pretraining data cannot be read",
            "install c++, or megatron-core from a wheel.",
        )


def _mindspeed(machine: Machine) -> Iterator[Finding]:
    found = machine.megatron.answer or {}
    core = found.get("version") or machine.version("megatron-core") or "none"
    yield from _adaptor(machine, core)
    version = machine.version("mindspeed")
    if not found.get("mindspeed"):
        return
    if mindspeed.needs_adaptor(core):
        yield note(
            "mindspeed",
            f"{version or 'of unknown version'} is not used: megatron-core {core} goes with "
            "MegatronAdaptor in its place",
        )
        return
    installed = mindspeed.inspect_folder(Path(found["mindspeed"]), version)
    stack = _stack(machine, core)
    if fault := mindspeed.fault(installed, stack):
        what, *pairs = fault.splitlines()
        way_out = "\n".join(["the pairs that go together:", *pairs] if pairs else [])
        needless = "or uninstall MindSpeed; the layers here do not need it."
        yield problem("mindspeed", what, f"{way_out}\n{needless}".lstrip())
    else:
        yield note("mindspeed", mindspeed.choose(None, "npu", installed, stack).why)


def _stack(machine: Machine, core: str) -> mindspeed.Stack:
    found = machine.megatron.answer or {}
    return mindspeed.Stack(
        megatron_core=core,
        torch=_release(machine.version("torch") or "none"),
        has_training=bool(found.get("training")),
        missing=tuple(found.get("missing", ())),
    )


def _adaptor(machine: Machine, core: str) -> Iterator[Finding]:
    """MegatronAdaptor and TransformerEngineNPU, where the first is installed."""
    found = machine.megatron.answer or {}
    if not found.get("adaptor"):
        return
    version = machine.version("megatron_adaptor")
    adaptor = mindspeed.Adaptor(
        Path(found["adaptor"]), version, bool(found.get("transformer_engine"))
    )
    if not mindspeed.needs_adaptor(core):
        since = ".".join(map(str, mindspeed.ADAPTOR_SINCE))
        yield note(
            "megatron_adaptor",
            f"{version or 'of unknown version'} is not used: it is for megatron-core {since} and "
            f"later, this is {core}",
        )
    elif fault := mindspeed.adaptor_fault(adaptor, core):
        yield problem("megatron_adaptor", *fault.split("; ", 1))
    else:
        engine = machine.version("transformer_engine") or "of unknown version"
        why = mindspeed.choose(None, "npu", None, _stack(machine, core), adaptor).why
        yield note("megatron_adaptor", f"{why}; transformer_engine {engine}")


def _environment(machine: Machine) -> Iterator[Finding]:
    """What a run on an NPU sets, or leaves because it is set."""
    if machine.version("torch_npu") is None and not machine.davinci_devices:
        return
    for variable in environment.wanted(600):
        found = machine.environ.get(variable.name)
        ruled_out = [name for name in variable.unless if name in machine.environ]
        if found is not None:
            yield ok(variable.name, f"{found} (a run would set {variable.value}): {variable.why}")
        elif ruled_out:
            yield ok(variable.name, f"is left unset, because {ruled_out[0]} is set")
        else:
            yield ok(variable.name, f"a run sets {variable.value}: {variable.why}")


def _memory(machine: Machine) -> Iterator[Finding]:
    available = re.search(r"^MemAvailable:\s+(\d+) kB", machine.read("/proc/meminfo"), re.MULTILINE)
    if available:
        free = int(available[1]) * 1024
        limit = _cgroup_limit(machine)
        text = f"{_gb(free)} free"
        if limit is not None and limit < free:
            text += f", this container may take {_gb(limit)}"
        yield ok("memory", text)
    if (shm := machine.file("/dev/shm")).is_dir():
        usage = shutil.disk_usage(shm)
        text = f"{_gb(usage.free)} of {_gb(usage.total)} free"
        if usage.free < SMALL_SHM_BYTES:
            yield problem(
                "/dev/shm",
                f"{text}; data workers and gloo put their buffers there",
                "start the container with --shm-size=16g or --ipc=host, or empty it.",
            )
        else:
            yield ok("/dev/shm", text)


def _cgroup_limit(machine: Machine) -> int | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = machine.read(path).strip()
        if text.isdigit() and int(text) < 2**60:
            return int(text)
    return None


def _limits(machine: Machine) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < SMALL_OPEN_FILES:
        wanted = min(hard, 65536) if hard > 0 else 65536
        yield note(
            "open files",
            f"{soft} (ulimit -n); many ranks or many data files need more",
            f"ulimit -n {wanted}",
        )
    else:
        yield ok("open files", f"{soft} (ulimit -n)")


def _network(machine: Machine) -> Iterator[Finding]:
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        yield note(
            "host name",
            f"{name} does not resolve; torchrun and gloo may wait for it or fail",
            f"add it to /etc/hosts: 127.0.0.1 {name}",
        )
    left = [key for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if key in machine.environ]
    if left:
        yield note(
            "environment",
            f"{', '.join(left)} set outside of torchrun",
            f"unset {' '.join(left)}",
        )


CHECKS: tuple[tuple[str, Callable[[Machine], Iterator[Finding]]], ...] = (
    ("python", _python),
    ("packages", _packages),
    ("torch", _torch_import),
    ("megatron", _megatron),
    ("MindSpeed", _mindspeed),
    ("NPU", _npu_devices),
    ("npu-smi", _npu_smi),
    ("CANN", _cann),
    ("torch_npu", _torch_npu),
    ("environment", _environment),
    ("memory", _memory),
    ("limits", _limits),
    ("network", _network),
)


def examine(machine: Machine) -> list[Finding]:
    """All findings. A check that fails is a finding itself; nothing is raised."""
    findings = []
    for name, check in CHECKS:
        try:
            findings += list(check(machine))
        except Exception as error:
            findings.append(note(name, f"could not be examined: {type(error).__name__}: {error}"))
    return findings


# --- helpers --------------------------------------------------------------------------------------


def _requirements() -> dict[str, str]:
    """Packages that this one needs, with the versions it takes: {"torch": ">=2.7", ...}."""
    try:
        lines = importlib.metadata.requires("qwen2-ascend") or []
    except importlib.metadata.PackageNotFoundError:
        return dict.fromkeys(("torch", "megatron-core", "transformers", "safetensors", "numpy"), "")
    found = {}
    for line in lines:
        match = re.match(r"([A-Za-z0-9._-]+)\s*([^;]*)", line)
        if match and "extra ==" not in line:
            found[match[1]] = match[2].strip()
    return dict(sorted(found.items(), key=lambda item: (item[0] != "torch", item[0])))


def _supported_pythons() -> list[str]:
    """The releases that this package's metadata name, ascending: ["3.10", ...]."""
    try:
        lines = importlib.metadata.metadata("qwen2-ascend").get_all("Classifier") or []
    except importlib.metadata.PackageNotFoundError:
        lines = []
    found = [line.rpartition(" ")[2] for line in lines if "Python :: 3." in line]
    return sorted(found, key=_numbers) or [platform.python_version()]


def _numbers(version: str) -> tuple[int, int]:
    """(3, 10) of 3.10.13."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _fits(version: str, specifier: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return True
    return SpecifierSet(specifier).contains(version, prereleases=True)


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB"


def report(findings: Sequence[Finding]) -> str:
    """The findings as lines; a way out stands below its finding."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        mark = {"ok": "ok", "note": "note", "problem": "PROBLEM"}[finding.level]
        lines.append(f"{mark:<7}  {finding.name:<{width}}  {finding.text}")
        if finding.way_out:
            indent = f"{'':<7}  {'':<{width}}  "
            way_out = finding.way_out.replace("\n", f"\n{indent}   ")
            lines.append(f"{indent}-> {way_out}")
    count = sum(finding.level == "problem" for finding in findings)
    lines += ["", "no problem found" if not count else f"{count} problem(s) found"]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the findings.

    Raises:
        SystemExit: 1, when there is a problem.
    """
    parser = argparse.ArgumentParser(
        description="Shows versions, devices and limits, and what is wrong with them. "
        "Exits with 1 when something is."
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    as_json = parser.parse_args(argv).json
    findings = examine(Machine())
    has_problem = any(finding.level == "problem" for finding in findings)
    if as_json:
        raw = {"ok": not has_problem, "findings": [finding._asdict() for finding in findings]}
        print(json.dumps(raw, indent=1))
    else:
        print(report(findings))
    if has_problem:
        raise SystemExit(1)
