"""What only reports (log, picture, metrics, TensorBoard, traces) goes through `attempt`.

A run that trains for days does not end because a disk for its metrics is full, and a finished one
does not fail because its picture cannot be drawn.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_failed: set[str] = set()


def attempt(what: str, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """Calls `action`; whatever goes wrong in it is said once per `what`, and the run goes on.

    No collective may be in `action`: the other ranks would wait for this one.

    Returns:
        What `action` gives, or None where it failed.
    """
    try:
        return action(*args, **kwargs)
    except Exception as error:
        if what not in _failed:
            _failed.add(what)
            atexit.register(_let_go_of_stdout)
            with suppress(OSError, ValueError):
                reason = " ".join(str(error).split()) or type(error).__name__
                print(f"warning: {what}: {reason}; the run goes on.", file=sys.stderr, flush=True)
        return None


def _let_go_of_stdout() -> None:
    """Keeps lines that can still not be written from becoming the exit status."""
    with suppress(ValueError):
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
