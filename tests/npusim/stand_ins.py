"""Inert stand-ins for what MindSpeed imports and the simulated device does not have.

triton's kernels need Ascend's compiler and torchair a graph engine of CANN's. MindSpeed imports
both for operators that nothing here calls. Every name can be imported from a stand-in and every
function decorated with it; calling what was decorated, or any other function, raises.

`python -m npusim.stand_ins SCRIPT [ARGUMENTS...]` is `npusim.run_inside` with them.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import runpy
import sys
import types
from typing import Any

PACKAGES = ("triton", "torchair", "einops", "scipy")
DECORATORS = {"jit", "autotune", "heuristics", "register_fx_node_ge_converter"}


class Inert:
    """Something that was imported: it has attributes and can be indexed, and computes nothing."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Inert:
        if name.startswith("__"):
            raise AttributeError(name)
        return Inert(f"{self._name}.{name}")

    def __getitem__(self, item: object) -> Inert:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{self._name} was called, of which there is a stand-in only")


class InertModule(types.ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = _stand_in(f"{self.__name__}.{name}")
        setattr(self, name, found)
        return found


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `packages` and all that is in them, where nobody else does."""

    def __init__(self, packages: set[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] not in self.packages:
            return None
        if not name.startswith("torchair") and not _is_torch_complete():
            return None  # torch asks too, and would use it
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return InertModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__version__ = "3.2.0"  # type: ignore[attr-defined]


def _is_torch_complete() -> bool:
    """Whether transfer_to_npu has imported all of torch, down to the inductor."""
    module = sys.modules.get("torch_npu.contrib.transfer_to_npu")
    return module is not None and not getattr(module.__spec__, "_initializing", False)


def _stand_in(path: str) -> Any:
    name = path.rpartition(".")[2]
    if name in DECORATORS:
        return _decorator(path)
    if name[:1].isupper() or name == "constexpr":
        return type(name, (), {"__init__": lambda self, *args, **kwargs: None})
    return Inert(path)


def _decorator(path: str) -> Any:
    """`@jit`, `@jit(...)`, `@register(operator)`: what is decorated becomes inert."""

    def decorate(*args: Any, **options: Any) -> Any:
        if len(args) == 1 and not options and isinstance(args[0], (types.FunctionType, Inert)):
            return Inert(f"{path} of {getattr(args[0], '__name__', 'a kernel')}")
        return decorate

    return decorate


def install() -> None:
    """Makes `import triton` and `import torchair` work; call it before torch_npu is imported."""
    absent = {name for name in PACKAGES if importlib.util.find_spec(name) is None}
    sys.meta_path.append(StandIns(absent))
    # torch_npu puts its own there where it is missing, and that one needs CANN
    importlib.import_module("torchair")


if __name__ == "__main__":
    install()
    runpy.run_module("npusim.run_inside", run_name="__main__", alter_sys=True)
