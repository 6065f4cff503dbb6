"""The one exception that means "the user can fix this": commands print it and exit with 2."""

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
