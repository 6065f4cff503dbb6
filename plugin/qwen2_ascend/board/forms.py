"""Values of a form, checked one by one; each fault names its field and what it may be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qwen2_ascend.errors import UserError, shown

MAX_TEXT = 20_000


def whole(form: Mapping[str, Any], name: str, low: int, high: int) -> int:
    """A whole number from `low` to `high`.

    Raises:
        UserError: it is none.
    """
    value = _number(form.get(name), int, 20)
    if type(value) is not int or not low <= value <= high:
        raise UserError(
            f"{name} {shown(form.get(name))} must be a whole number from {low} to {high}."
        )
    return value


def real(form: Mapping[str, Any], name: str, low: float, high: float) -> float:
    """A number above `low` and up to `high`.

    Raises:
        UserError: it is none.
    """
    value = finite(_number(form.get(name), float, 40))
    if value is None or not low < value <= high:
        raise UserError(
            f"{name} {shown(form.get(name))} must be a number above {low:g} and up to {high:g}."
        )
    return value


def finite(value: Any, below: float = math.inf) -> float | None:
    """A number of a size below `below`; None where it is larger, or no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if abs(value) < below else None


def _number(value: Any, kind: type[int] | type[float], longest: int) -> Any:
    """Reads a text of up to `longest` characters as a number, None where it is none."""
    if not isinstance(value, str) or len(value) > longest:
        return value
    try:
        return kind(value)
    except ValueError:
        return None


def choice(form: Mapping[str, Any], name: str, choices: Sequence[str]) -> str:
    """One of `choices`.

    Raises:
        UserError: it is none of them.
    """
    value = form.get(name)
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{name} {shown(value)} must be one of {', '.join(choices)}.")
    return value


def text(form: Mapping[str, Any], name: str) -> str:
    """A text that is not empty.

    Raises:
        UserError: it is none, or too long, or holds what is no character.
    """
    value = form.get(name)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{name}: give a text.")
    if len(value) > MAX_TEXT:
        raise UserError(f"{name}: has {len(value)} characters, more than {MAX_TEXT}.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name}: holds half of a character.") from None
    return value


def flag(form: Mapping[str, Any], name: str) -> bool:
    """Whether a box is ticked.

    Raises:
        UserError: the value is neither true nor false.
    """
    value = form.get(name, False)
    if not isinstance(value, bool):
        raise UserError(f"{name} {shown(value)} must be true or false.")
    return value
