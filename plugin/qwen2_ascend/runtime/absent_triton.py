"""megatron-core without triton, which its releases 0.18 and later import and nothing here uses.

One of their modules holds triton kernels for mixtures of experts and imports triton without asking
whether it is there. Without a GPU it usually is not: on an NPU it comes with triton-ascend, if at
all. This module lends that one module a stand-in for as long as it is imported. Nobody else sees
the stand-in, so whoever asks for triton (torch, megatron-core's other modules) hears the truth.

At import this module needs the standard library alone.
"""

from __future__ import annotations

import builtins
import importlib.util
import sys
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType, SimpleNamespace
from typing import Any

from qwen2_ascend.runtime.ledger import record

BORROWERS = (
    "megatron.core.transformer.moe.paged_stash",  # 0.18
    "megatron.core.transformer.moe.ops.paged_stash",  # 0.19
)
"""Modules of megatron-core that import triton whether it is there or not."""


def lend() -> None:
    """Lets megatron-core be imported where triton is not installed; comes before its import."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds the borrowers where Python finds them, and has them loaded with the stand-in."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in BORROWERS or importlib.util.find_spec("triton") is not None:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Lender(spec.loader)
        return spec


class _Lender(Loader):
    """Loads a module whose own import statements find the stand-in."""

    def __init__(self, original: Loader) -> None:
        self._original = original

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._original.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__builtins__"] = {**vars(builtins), "__import__": _import}
        self._original.exec_module(module)
        record(
            f"{module.__name__}:triton",
            why="megatron-core imports triton kernels of mixtures of experts, installed or not",
            how="lends this one module a stand-in whose kernels raise when they are called",
            until="megatron-core asks whether triton is there, as its other modules do",
        )


def _import(name: str, *args: Any) -> Any:
    return _TRITON if name.partition(".")[0] == "triton" else builtins.__import__(name, *args)


class _Kernel:
    """What `@triton.jit` makes of a function; `kernel[grid](...)` is how it would be launched."""

    def __init__(self, function: Any) -> None:
        self._name = function.__name__

    def __getitem__(self, grid: Any) -> Any:
        raise RuntimeError(f"{self._name} is a triton kernel, and triton is not installed.")


_TRITON = SimpleNamespace(jit=_Kernel, language=SimpleNamespace(constexpr=object))
