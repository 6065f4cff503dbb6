"""Checks of Python, the packages, and whether torch can be imported."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Iterator

from qwen2_ascend.doctor.findings import Finding, note, ok, problem
from qwen2_ascend.doctor.machine import Machine
from qwen2_ascend.runtime.mindspeed import release

NPU_PACKAGES = ("torch_npu", "mindspeed", "megatron_adaptor")
OTHER_PACKAGES = ("pyarrow", "matplotlib", "tensorboard", "datasets")

TORCH_PROBE = """
import json, torch
print(json.dumps(dict(cuda=torch.version.cuda, cuda_available=torch.cuda.is_available())))
"""


def check_python(machine: Machine) -> Iterator[Finding]:
    version = platform.python_version()
    text = f"{version} ({machine.python}), {platform.system()} {platform.machine()}"
    supported = supported_pythons()
    place, oldest, newest = map(_numbers, (version, supported[0], supported[-1]))
    span = f"{supported[0]} to {supported[-1]}"
    if place < oldest:
        yield problem("python", f"{text}; too old", f"use Python {span}.")
    elif place > newest:
        yield note("python", f"{text}; not tested, {span} are")
    else:
        yield ok("python", text)


def check_packages(machine: Machine) -> Iterator[Finding]:
    for name, specifier in requirements().items():
        yield _package(machine, name, specifier)
    for name in (*NPU_PACKAGES, *OTHER_PACKAGES):
        if machine.version(name) is not None:
            yield _package(machine, name, "")


def _package(machine: Machine, name: str, specifier: str) -> Finding:
    wanted = f"{name}{specifier}"
    found = machine.versions(name)
    if not found:
        return problem(name, "is not installed", f'pip install "{wanted}"')
    version, folder = found[0]
    if specifier and not _fits(version, specifier):
        return problem(name, f"{version} does not fit {specifier}", f'pip install "{wanted}"')
    if len(found) == 1:
        return ok(name, version)
    others = ", ".join(f"{v} in {where}" for v, where in found[1:])
    text = f"{version} in {folder} hides {others}"
    return note(name, text, "remove the one that is not meant.")


def check_torch(machine: Machine) -> Iterator[Finding]:
    if machine.version("torch") is None:
        return
    torch = machine.probe(TORCH_PROBE)
    if torch.error:
        way_out = "install torch again: pip install --force-reinstall torch"
        if "numpy" in torch.error.lower():
            way_out = "install a numpy that this torch was built for."
        yield problem("import torch", torch.error, way_out)
        return
    cuda = torch.answer["cuda"]
    if cuda and not torch.answer["cuda_available"]:
        yield note(
            "import torch",
            f"a CUDA {cuda} build and no CUDA device; it works on the CPU, and is GBs too large",
            cpu_build(machine),
        )
    else:
        yield ok("import torch", f"works, {f'CUDA {cuda}' if cuda else 'CPU build'}")


def requirements() -> dict[str, str]:
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


def cpu_build(machine: Machine) -> str:
    """The way to torch's CPU build of the same release."""
    return (
        f'install the CPU build: pip install "torch=={release(machine.version("torch") or "")}" '
        "--index-url https://download.pytorch.org/whl/cpu"
    )


def supported_pythons() -> list[str]:
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
