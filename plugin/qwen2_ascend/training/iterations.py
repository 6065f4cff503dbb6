"""What checkpoints of every kind have in common: an iteration's folder, progress, generators.

An iteration is written beside its place and renamed into it when every rank's part is on the disk:
killed at any moment, the folder holds the last checkpoint or the new one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qwen2_ascend.checkpoint.formats import megatron, torch_pt
from qwen2_ascend.checkpoint.formats.stored import NUMPY_DTYPES, StoredTensor
from qwen2_ascend.checkpoint.staging import fsync_folder, fsync_tree, partial_folder, write_file
from qwen2_ascend.files import open_regular
from qwen2_ascend.training import schedule as schedules
from qwen2_ascend.training.loop import Progress, TrainingRun
from qwen2_ascend.training.rng_state import set_rng_state


def begin_iteration(run: TrainingRun, save: Path) -> Path:
    """The empty folder that the run's state is to be written into; every rank calls it.

    What killed runs left unfinished in `save` is removed.

    Raises:
        OSError: it cannot be written.
    """
    partial = partial_folder(_iteration_folder(run, save))
    if run.runtime.rank == 0:
        for unfinished in save.glob(".iter_*.partial"):
            shutil.rmtree(unfinished)
        partial.mkdir(parents=True)
    run.runtime.barrier()
    return partial


def publish_iteration(
    run: TrainingRun, save: Path, side_files: Mapping[Path, bytes] | None = None
) -> Path:
    """Gives what all ranks have written its name; every rank calls it when its own part is there.

    Args:
        run: the run of `begin_iteration`.
        save: its folder.
        side_files: what is written beside the iteration, by its place in `save`.

    Returns:
        The folder of the iteration, which is the last one now.

    Raises:
        OSError: it cannot be written; `save` holds the last checkpoint.
    """
    target = _iteration_folder(run, save)
    run.runtime.barrier()
    if run.runtime.rank == 0:
        publish(partial_folder(target), target)
        for path, data in (side_files or {}).items():
            write_file(save / path, data)
        write_file(save / megatron.TRACKER_FILE, str(run.progress.iteration).encode())
        fsync_folder(save)
    run.runtime.barrier()
    return target


def publish(partial: Path, target: Path) -> None:
    """Renames a finished folder into its place; what was there before goes."""
    fsync_tree(partial)
    old = target.with_name(f".{target.name}.replaced")
    if target.exists():
        # the same iteration again: a run that went on from an earlier checkpoint
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
    os.rename(partial, target)
    fsync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _iteration_folder(run: TrainingRun, save: Path) -> Path:
    return save / f"iter_{run.progress.iteration:07d}"


def progress_state(run: TrainingRun) -> dict[str, Any]:
    """What `restore_progress` puts back, in plain values."""
    return {
        "progress": asdict(run.progress),
        "opt_param_scheduler": run.schedule.state_dict(),
    }


def restore_progress(run: TrainingRun, state: Mapping[str, Any]) -> list[str]:
    """Puts progress and schedule back.

    Returns:
        What of the schedule is not as it was, in words for the log.
    """
    run.progress = Progress(**state["progress"])
    was = dict(state["opt_param_scheduler"])
    changes = schedules.changed(run.schedule, was)
    run.schedule.load_state_dict(was)
    return [f"schedule: {change}" for change in changes]


def restore_rng(run: TrainingRun, file: Path, *, unlike: str | None) -> list[str]:
    """Puts this rank's random number generators back, where they fit.

    Args:
        run: the run.
        file: what `torch.save` made of `rng_state`.
        unlike: how the run differs from that which was saved, so that they do not fit.

    Returns:
        That they were left alone, in words for the log, if they were.

    Raises:
        UserError: the file is missing or damaged.
    """
    if unlike:
        return [f"{unlike}: the random number generators are seeded anew"]
    set_rng_state(run.runtime, with_tensors(torch_pt.read(file)))
    return []


def with_tensors(tree: Any) -> Any:
    """The same containers with the stored tensors read."""
    if isinstance(tree, StoredTensor):
        return _read_tensor(tree)
    if isinstance(tree, Mapping):
        return {key: with_tensors(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [with_tensors(value) for value in tree]
    return tree


def _read_tensor(stored: StoredTensor) -> torch.Tensor:
    with open_regular(stored.path) as file:
        file.seek(stored.offset)
        data = bytearray(file.read(stored.num_bytes))
    dtype = getattr(torch, NUMPY_DTYPES[stored.dtype].name)
    return torch.frombuffer(data, dtype=dtype).reshape(stored.shape)
