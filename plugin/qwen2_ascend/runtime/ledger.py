"""The ledger of redirects: whatever is replaced in somebody else's module is written down here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    """The condition under which it can go."""


_APPLIED: dict[str, Patch] = {}


def applied_patches() -> tuple[Patch, ...]:
    """Every redirect made in this process, in the order of application."""
    return tuple(_APPLIED.values())


def apply(patch: Patch, replacement: Callable[[Any], Any]) -> None:
    """Replaces the target with `replacement(original)`; a second time does nothing."""
    if patch.target not in _APPLIED:
        owner, name, original = _find(patch.target)
        setattr(owner, name, replacement(original))
        _APPLIED[patch.target] = patch


def record(patch: Patch) -> None:
    """Notes what somebody else's code has replaced on our behalf."""
    _APPLIED[patch.target] = patch


@contextmanager
def applied_during(patch: Patch, replacement: Callable[[Any], Any]) -> Iterator[None]:
    """Replaces the target for the length of a `with` block only.

    It is recorded all the same: what is imported in the block keeps what it saw.
    """
    owner, name, original = _find(patch.target)
    setattr(owner, name, replacement(original))
    try:
        yield
    finally:
        setattr(owner, name, original)
    _APPLIED[patch.target] = patch


def _find(target: str) -> tuple[Any, str, Any]:
    """(owner, attribute name, attribute) of `module:attribute.path`."""
    module_name, _, path = target.partition(":")
    *parents, name = path.split(".")
    owner = importlib.import_module(module_name)
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name, getattr(owner, name)
