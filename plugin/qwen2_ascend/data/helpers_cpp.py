"""megatron-core's C++ helpers for sample indices: found, or compiled where that is possible.

The wheels of megatron-core carry `helpers_cpp` compiled, its source tree does not: there Megatron
runs `make` inside the package, which fails where the installation cannot be written. Here it is
compiled into the user's cache instead, once for each version of the source, from the same file
and against the pybind11 headers that torch ships.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib import import_module
from pathlib import Path

import torch
import xxhash

from qwen2_ascend.errors import UserError

MODULE = "megatron.core.datasets.helpers_cpp"


def ensure_helpers_cpp() -> None:
    """Makes `megatron.core.datasets.helpers_cpp` importable.

    Raises:
        UserError: it is not there and cannot be compiled.
    """
    try:
        import_module(MODULE)
        return
    except ModuleNotFoundError as error:
        if error.name != MODULE:
            raise
    package = import_module("megatron.core.datasets")
    library = compile_helpers_cpp(Path(package.__path__[0]) / "helpers.cpp")
    spec = importlib.util.spec_from_file_location(MODULE, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[MODULE] = module
    setattr(package, "helpers_cpp", module)  # noqa: B010


def compile_helpers_cpp(source: Path) -> Path:
    """The extension module's file of megatron-core's helpers.cpp, in the user's cache.

    It is compiled unless that was done before; safe for several processes at once.

    Raises:
        UserError: no compiler, or it fails.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen2-ascend"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    library = folder / f"helpers_cpp-{xxhash.xxh3_64(source.read_bytes()).hexdigest()}{suffix}"
    if library.exists():
        return library
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise UserError(
            f"{MODULE} is not compiled and there is no C++ compiler (c++, or what CXX names); "
            "install one, or install megatron-core from a wheel, which carries it compiled."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        with contextlib.suppress(OSError):  # without locks it is compiled twice at worst
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            includes = [Path(torch.__file__).parent / "include", sysconfig.get_path("include")]
            temporary = library.with_suffix(f".{os.getpid()}.tmp")
            _run(
                [compiler, "-O3", "-shared", "-std=c++17", "-fPIC"]
                + [f"-I{include}" for include in includes]
                + [str(source), "-o", str(temporary)]
            )
            temporary.replace(library)
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        first = next((x for x in done.stderr.splitlines() if "error" in x), done.stderr[:200])
        raise UserError(
            f"{MODULE} is not compiled, and compiling it failed: {first.strip()} "
            f"(command: {' '.join(command)})"
        )
