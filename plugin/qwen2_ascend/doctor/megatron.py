"""Checks of megatron-core, and of MindSpeed and MegatronAdaptor, which go with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen2_ascend.doctor.findings import Finding, note, ok, problem
from qwen2_ascend.doctor.machine import Machine
from qwen2_ascend.runtime import mindspeed

# Where things would come from is asked without importing them; the parents are namespaces.
_FOLDERS = """
import importlib.util, json, os, runpy
def folder(name):
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return next(iter(spec.submodule_search_locations or []), None) if spec else None
names = "megatron.core", "megatron.training", "mindspeed", "megatron_adaptor", "transformer_engine"
found = {name.rpartition(".")[2]: folder(name) for name in names}
info = os.path.join(found["core"] or "", "package_info.py")
if found["core"] and os.path.exists(info):
    found["version"] = runpy.run_path(info).get("__version__", "").partition("+")[0] or None
found["missing"] = [name for name in ("einops", "scipy", "triton")
                    if importlib.util.find_spec(name) is None]
print(json.dumps(found))
"""

# As a run imports it: a triton that is missing is no fault. This package comes last on the path.
_LEND_TRITON = f"""
import importlib.util, json, sys
sys.path.append({str(Path(__file__).parents[2])!r})
from qwen2_ascend.runtime import absent_triton
absent_triton.lend()
"""

_IMPORT = f"""{_LEND_TRITON}
import megatron.core
lent = [name for name in absent_triton.BORROWERS if name in sys.modules]
print(json.dumps(bool(lent) and importlib.util.find_spec("triton") is None))
"""

_HELPERS = f"""{_LEND_TRITON}
import megatron.core.datasets
spec = importlib.util.find_spec("megatron.core.datasets.helpers_cpp")
print(json.dumps(spec.origin if spec else None))
"""


def check_megatron(machine: Machine) -> Iterator[Finding]:
    found, error = machine.probe(_FOLDERS)
    installed = machine.version("megatron-core")
    if error:
        yield problem("megatron", error, "pip install --force-reinstall megatron-core")
    elif found["core"]:
        yield _origin(machine, found["core"], found.get("version"), installed)
        if where := found["training"]:
            text = f"found in {where}; MindSpeed uses it, this project not"
            yield note("megatron.training", text)
        yield from _imported(machine)
    elif installed is not None:
        yield problem(
            "megatron.core",
            "is not found, though megatron-core is installed: another `megatron` hides it",
            "look for a folder or package named megatron on PYTHONPATH.",
        )


def _origin(machine: Machine, folder: str, version: str | None, installed: str | None) -> Finding:
    """Whether the megatron.core that is imported is the one that pip knows."""
    places = [f"{place}/megatron/core" for _, place in machine.versions("megatron-core")]
    if installed is None or os.path.realpath(folder) in map(os.path.realpath, places):
        return ok("megatron.core", f"{version} from {folder}")
    if version == installed:
        text = f"comes from {folder}, not from pip's megatron-core of the same version"
        return note("megatron.core", text)
    return problem(
        "megatron.core",
        f"{version} in {folder} hides pip's megatron-core {installed}",
        "take that folder off PYTHONPATH, or install the megatron-core of its version.",
    )


def _imported(machine: Machine) -> Iterator[Finding]:
    imported = machine.probe(_IMPORT)
    if imported.error:
        way_out = "install a megatron-core that fits torch, or see the line on torch."
        yield problem("import megatron.core", imported.error, way_out)
    else:
        lent = "; triton is not installed, and nothing here uses it" if imported.answer else ""
        yield ok("import megatron.core", f"works{lent}")
        yield _helpers_cpp(machine)


def _helpers_cpp(machine: Machine) -> Finding:
    found = machine.probe(_HELPERS)
    if found.error:
        return problem("helpers_cpp", found.error, "pip install --force-reinstall megatron-core")
    if found.answer:
        return ok("helpers_cpp", "compiled")
    if compiler := machine.program(machine.environ.get("CXX", "c++")):
        text = f"is not compiled; {compiler} will do it when data is first read"
        return note("helpers_cpp", text)
    return problem(
        "helpers_cpp",
        "is not compiled and there is no C++ compiler; pretraining data cannot be read",
        "install c++, or megatron-core from a wheel.",
    )


def check_mindspeed(machine: Machine) -> Iterator[Finding]:
    found = machine.probe(_FOLDERS).answer
    core = found.get("version") or machine.version("megatron-core") or "none"
    stack = mindspeed.Stack(
        megatron_core=core,
        torch=mindspeed.release(machine.version("torch") or "none"),
        has_training=bool(found.get("training")),
        missing=tuple(found.get("missing", ())),
    )
    if found.get("megatron_adaptor"):
        yield _adaptor(machine, found, stack)
    if not found.get("mindspeed"):
        return
    version = machine.version("mindspeed")
    if mindspeed.needs_adaptor(core):
        yield note(
            "mindspeed",
            f"{version or 'of unknown version'} is not used: megatron-core {core} goes with "
            "MegatronAdaptor in its place",
        )
        return
    installed = mindspeed.inspect_folder(Path(found["mindspeed"]), version)
    if fault := mindspeed.fault(installed, stack):
        what, *pairs = fault.splitlines()
        way_out = "\n".join(["the pairs that go together:", *pairs] if pairs else [])
        needless = "or uninstall MindSpeed; the layers here do not need it."
        yield problem("mindspeed", what, f"{way_out}\n{needless}".lstrip())
    else:
        yield note("mindspeed", mindspeed.choose(None, "npu", installed, stack).why)


def _adaptor(machine: Machine, found: dict[str, Any], stack: mindspeed.Stack) -> Finding:
    """MegatronAdaptor and TransformerEngineNPU."""
    core, version = stack.megatron_core, machine.version("megatron_adaptor")
    has_engine = found["transformer_engine"] is not None
    adaptor = mindspeed.Adaptor(Path(found["megatron_adaptor"]), version, has_engine)
    if not mindspeed.needs_adaptor(core):
        since = ".".join(map(str, mindspeed.ADAPTOR_SINCE))
        return note(
            "megatron_adaptor",
            f"{version or 'of unknown version'} is not used: it is for megatron-core {since} and "
            f"later, this is {core}",
        )
    if fault := mindspeed.adaptor_fault(adaptor, core):
        return problem("megatron_adaptor", *fault.split("; ", 1))
    engine = machine.version("transformer_engine") or "of unknown version"
    why = mindspeed.choose(None, "npu", None, stack, adaptor).why
    return note("megatron_adaptor", f"{why}; transformer_engine {engine}")
