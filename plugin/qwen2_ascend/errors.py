"""Exceptions whose message says all: a user's mistake (exit 2) and a lost rank (exit 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """A mistake in what was asked for, with the way out in the message.

    Attributes:
        faults: every fault found, one sentence each, so that none is met one at a time.
    """

    def __init__(self, faults: str | Iterable[str]) -> None:
        self.faults: tuple[str, ...] = (faults,) if isinstance(faults, str) else tuple(faults)
        super().__init__("\n".join(self.faults))


class LostRankError(RuntimeError):
    """Another rank does not answer; the message names it, and no traceback says more."""


def raise_if(faults: Iterable[str]) -> None:
    """Raises UserError with all of `faults`, or returns when there is none."""
    if faults := tuple(faults):
        raise UserError(faults)


class Faults(list[str]):
    """Faults that independent checks find, for `raise_if`: one that fails hides no other."""

    def of(self, check: Callable[[], T]) -> T | None:
        """What the check gives, or None where it raises UserError, which is added."""
        try:
            return check()
        except UserError as error:
            self += [fault for fault in error.faults if fault not in self]
            return None
