"""Exceptions whose message says all: a user's mistake (exit 2) and a lost rank (exit 1)."""

from __future__ import annotations

import io
import reprlib
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_MOST_CHARACTERS = 10_000
"""The longest text of one fault; a file may give a tensor a name of megabytes."""
_MOST_NAMED = 20
"""The most names, or faults of one kind, in a list."""
_MOST_FAULTS = 1000
"""A file may hold a fault for each of its bytes."""


class Lines(str):
    """A fault of several lines that are this project's own words, printed as they are."""


class UserError(ValueError):
    """A mistake in what was asked for, with the way out in the message.

    Faults quote names and texts that other people's files hold, so whatever could move the cursor,
    begin a line or turn the direction of writing is escaped here, for every message at once.

    Attributes:
        faults: every fault found (of very many, the first), one sentence each, so that none is met
            one at a time.
    """

    def __init__(self, faults: str | Iterable[str]) -> None:
        given = (faults,) if isinstance(faults, str) else tuple(faults)
        if len(given) > _MOST_FAULTS:
            given = (*given[:_MOST_FAULTS], f"and {len(given) - _MOST_FAULTS} more faults.")
        self.faults: tuple[str, ...] = tuple(map(printable, given))
        super().__init__("\n".join(self.faults))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.faults,)


class DamagedError(UserError):
    """A file that is not as it was written; another copy of it, or an older one, may be.

    Attributes:
        folder: the damaged checkpoint's folder, where that is known.
    """

    folder: Path | None = None


class VerificationError(RuntimeError):
    """What was read or written is not what it should be; going on from it would be wrong."""


def printable(text: str) -> str:
    r"""`text` on one line: control, format and unpaired surrogate characters as `\x1b`, `\u202e`.

    What is longer than a message can be is cut.
    """
    if isinstance(text, Lines):
        return text
    if len(text) > _MOST_CHARACTERS:
        text = f"{text[:_MOST_CHARACTERS]}... ({len(text)} characters)"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: Any) -> str:
    """The beginning of a value from a file, for a message; it may be deep, cyclic or endless."""
    return _BRIEF.repr(value)


_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxother = 2, 80


class LostRankError(RuntimeError):
    """Another rank does not answer; the message names it, and no traceback says more."""


def print_any_text() -> None:
    """Lets the standard output take every text, whatever the encoding that the locale gives it.

    What that encoding has not is written with backslashes, as Python does it on stderr.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def raise_if(faults: Iterable[str]) -> None:
    """Raises UserError with all of `faults`, or returns when there is none."""
    if faults := tuple(faults):
        raise UserError(faults)


def name_faults(what: str, names: Sequence[str]) -> list[str]:
    """One fault that counts `names` and lists the first of them; none where there are none."""
    if not names:
        return []
    return [f"{len(names)} {what}: {first_of(names)}."]


def first_of(names: Sequence[str], most: int = _MOST_NAMED) -> str:
    """The first of many names, and how many more there are: `a, b and 3 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def at_most(faults: list[str]) -> list[str]:
    """The first of many faults of one kind, and how many more there are."""
    if (more := len(faults) - _MOST_NAMED) <= 0:
        return faults
    return [*faults[:_MOST_NAMED], f"and {more} more faults of this kind."]


class Faults(list[str]):
    """Faults that independent checks find, for `raise_if`: one that fails hides no other."""

    def collect(self, check: Callable[[], T]) -> T | None:
        """What the check gives, or None where it raises UserError, which is added."""
        try:
            return check()
        except UserError as error:
            self += [fault for fault in error.faults if fault not in self]
            return None
