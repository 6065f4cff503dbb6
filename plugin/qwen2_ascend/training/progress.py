"""What checkpoints of every kind have in common: progress, schedule, random number generators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen2_ascend.checkpoint.formats import torch_pt
from qwen2_ascend.checkpoint.formats.pickles import Inert
from qwen2_ascend.checkpoint.formats.stored import NUMPY_DTYPES, StoredTensor
from qwen2_ascend.training import schedule as schedules
from qwen2_ascend.training.loop import Progress, TrainingRun
from qwen2_ascend.training.rng_state import set_rng_state


def progress_state(run: TrainingRun) -> dict[str, Any]:
    """What `restore_progress` puts back, in plain values."""
    return {
        **run.marks,
        "progress": asdict(run.progress),
        "opt_param_scheduler": run.schedule.state_dict(),
    }


def restore_progress(
    run: TrainingRun, state: Mapping[str, Any], *, with_schedule: bool = True
) -> list[str]:
    """Puts progress and schedule back.

    Args:
        state: what `progress_state` gave; or Megatron-LM's, which may lack the schedule's.
        with_schedule: whether the schedule of the learning rate goes on; else it begins anew.

    Returns:
        What of the schedule is not as it was, in words for the log.
    """
    run.progress = Progress(**state["progress"])
    if not with_schedule:
        return ["schedule: the learning rate begins as at iteration 1"]
    if state["opt_param_scheduler"] is None:
        run.schedule.step(increment=run.progress.consumed_samples)
        return ["schedule: the checkpoint has none; it goes by the samples consumed"]
    was = dict(state["opt_param_scheduler"])
    changes = schedules.changed(run.schedule, was)
    run.schedule.load_state_dict(was)
    return [f"schedule: {change}" for change in changes]


def restore_rng(run: TrainingRun, file: Path, *, unlike: str | None) -> list[str]:
    """Puts this rank's random number generators back, where they fit.

    Args:
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
    """The same containers with the stored tensors read, and numpy's arrays made."""
    if isinstance(tree, StoredTensor):
        data, dtype = bytearray(tree.array().tobytes()), NUMPY_DTYPES[tree.dtype].name
        return torch.frombuffer(data, dtype=getattr(torch, dtype)).reshape(tree.shape)
    if isinstance(tree, Inert) and tree.type_name.endswith("multiarray._reconstruct"):
        _, shape, dtype, _, data = tree.state
        return np.frombuffer(data, dtype.args[0]).reshape(shape)
    if isinstance(tree, Mapping):
        return {key: with_tensors(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [with_tensors(value) for value in tree]
    return tree
