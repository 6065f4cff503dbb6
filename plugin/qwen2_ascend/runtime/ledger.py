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


def apply(target: str, replacement: Callable[[Any], Any], **reasons: str) -> None:
    """Replaces the target with `replacement(original)`; a second time does nothing.

    Args:
        target: as in `Patch`.
        replacement: gets what is there, gives what takes its place.
        **reasons: the other fields of `Patch`.
    """
    if target not in _APPLIED:
        owner, name, original = _find(target)
        setattr(owner, name, replacement(original))
        record(target, **reasons)


def record(target: str, **reasons: str) -> None:
    """Notes what somebody else's code has replaced on our behalf."""
    _APPLIED[target] = Patch(target=target, **reasons)


@contextmanager
def applied_during(
    target: str, replacement: Callable[[Any], Any], **reasons: str
) -> Iterator[None]:
    """Replaces the target for the length of a `with` block only.

    It is recorded all the same: what is imported in the block keeps what it saw.
    """
    owner, name, original = _find(target)
    setattr(owner, name, replacement(original))
    try:
        yield
    finally:
        setattr(owner, name, original)
    record(target, **reasons)


def _find(target: str) -> tuple[Any, str, Any]:
    """(owner, attribute name, attribute) of `module:attribute.path`."""
    module_name, _, path = target.partition(":")
    *parents, name = path.split(".")
    owner = importlib.import_module(module_name)
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name, getattr(owner, name)
