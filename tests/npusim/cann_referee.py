"""CANN's own Python models of its operators, from checkouts of its operator repositories.

CANN_OPS_PATH names checkouts, separated as in PATH: of ops-transformer and of ops-nn. Nothing of
them is kept here: their files are run where they lie, and only their results are compared.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

VARIABLE = "CANN_OPS_PATH"


def model(path: str, *beside: str, unused: tuple[str, ...] = ()) -> ModuleType:
    """The module at `path` in one of the checkouts; skips the test where there is none.

    Args:
        path: of the file, in the checkout.
        beside: modules of its folder that it imports by name.
        unused: modules that it imports and that the model does not use, besides torch_npu.
    """
    found = next((x / path for x in checkouts() if (x / path).is_file()), None)
    if found is None:
        pytest.skip(f"none of the checkouts of {VARIABLE} has {path}")
    with _importing(found.parent, beside, ("torch_npu", *unused)):
        return _load(found)


def checkouts() -> list[Path]:
    """Those that CANN_OPS_PATH names; skips the test where it names none."""
    named = [Path(x) for x in os.environ.get(VARIABLE, "").split(os.pathsep) if x]
    if not named:
        pytest.skip(f"{VARIABLE} names no checkout of CANN's operator repositories")
    missing = [str(x) for x in named if not x.is_dir()]
    assert not missing, f"{VARIABLE}: no folder {missing}"
    return named


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"cann_{path.parent.name}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Unused(ModuleType):
    """A module that has every name: each stands for a base class, or for a decorator's maker."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing


class _Nothing:
    def __init__(self, *arguments: object) -> None:
        pass

    def __call__(self, decorated: object) -> object:
        return decorated


@contextmanager
def _importing(folder: Path, names: tuple[str, ...], unused: tuple[str, ...]) -> Iterator[None]:
    """Modules of that folder can be imported by name, and the unused ones by any."""
    before = {name: sys.modules.get(name) for name in (*names, *unused)}
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    for name in before:
        sys.modules.pop(name, None)
    sys.modules.update({name: _Unused(name) for name in unused})
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.dont_write_bytecode = writes
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
