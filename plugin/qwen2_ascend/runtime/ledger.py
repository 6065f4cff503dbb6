"""The ledger of redirects: whatever is replaced in somebody else's module is written down here."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One replaced attribute."""

    target: str
    """`module:attribute.path`, as in "torch:Tensor.type"."""
    why: str
    """What breaks without it."""
    how: str
    """What the replacement does."""
    until: str
    """When it can go."""


_APPLIED: dict[str, Patch] = {}


def applied_patches() -> tuple[Patch, ...]:
    """Every redirect in force in this process, in the order of application."""
    return tuple(_APPLIED.values())


def apply(patch: Patch, replacement: Callable[[Any], Any]) -> None:
    """Replaces the target with `replacement(original)`; a second time does nothing."""
    if patch.target in _APPLIED:
        return
    module_name, _, path = patch.target.partition(":")
    *parents, name = path.split(".")
    owner = importlib.import_module(module_name)
    for parent in parents:
        owner = getattr(owner, parent)
    setattr(owner, name, replacement(getattr(owner, name)))
    _APPLIED[patch.target] = patch
