"""What this process may ask of the machine and of torchrun; the standard library alone."""

from __future__ import annotations

import os

from qwen2_ascend.errors import UserError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
"""The variables by which torchrun tells a process its place, which are read here alone."""


def place() -> tuple[int, int, int]:
    """(rank, world size, local rank) from torchrun, or of a single process.

    Raises:
        UserError: a part of it is missing or no number.
    """
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, 0
    if missing := [name for name in TORCHRUN if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set but {', '.join(missing)} is not; start "
            "with torchrun, or unset WORLD_SIZE for a single process."
        )
    if wrong := [f"{n}={os.environ[n]}" for n in TORCHRUN if not os.environ[n].isdecimal()]:
        raise UserError(f"{', '.join(wrong)} is no number; start with torchrun.")
    return rank(), world_size(), local_rank()


def rank() -> int:
    """This process's rank; 0 of a process alone."""
    return _number("RANK", 0)


def world_size() -> int:
    """How many processes torchrun has started; 1 of a process alone."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """This process's rank on its node; 0 of a process alone."""
    return _number("LOCAL_RANK", 0)


def local_world_size(default: int) -> int:
    """How many processes torchrun has started on this node; `default` where nobody says it."""
    return _number("LOCAL_WORLD_SIZE", default)


def num_cores() -> int:
    """Cores that this process may use; in a container those of the container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _number(name: str, default: int) -> int:
    """A variable's number; `default` where it holds none, which `place` refuses in TORCHRUN."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default
