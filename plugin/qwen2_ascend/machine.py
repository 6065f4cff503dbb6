"""What this process may ask of the machine and of torchrun; the standard library alone."""

from __future__ import annotations

import os


def rank() -> int:
    """This process's rank; 0 of a process alone."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes torchrun has started; 1 of a process alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def num_cores() -> int:
    """Cores that this process may use; in a container those of the container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
