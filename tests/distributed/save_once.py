"""Writes one checkpoint, as a launcher does at an interval."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any


def save_once(training: Any, make: Callable[[Callable[[str], None]], Any]) -> Path:
    """Writes the state of `training` with the checkpointer that `make` makes.

    Returns:
        The folder of the iteration.
    """
    folder = training.settings.checkpoint.save
    with closing(make(lambda line: None)) as checkpointer:
        checkpointer.claim()
        checkpointer.save()
        checkpointer.finish()
    training.runtime.barrier()
    return folder / f"iter_{training.progress.iteration:07d}"
