"""ProfileSettings: the flags of every launcher that trains, for its profiler.

The names are Megatron's and MindSpeed-LLM's. Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from qwen2_ascend.errors import UserError
from qwen2_ascend.flags import Flag, given_flags


@dataclass(frozen=True, kw_only=True)
class ProfileSettings:
    """A trace of some steps, by torch's profiler or torch_npu's."""

    profile: Flag = False
    """Record the steps from --profile-step-start to --profile-step-end."""
    profile_step_start: int | None = None
    """Steps to make before recording; by default 10."""
    profile_step_end: int | None = None
    """Steps after which recording ends; by default 12: iterations 11 and 12 are recorded."""
    profile_steps: Annotated[str | None, tyro.conf.arg(metavar="START:END")] = None
    """The three in one, as in 10:12."""
    profile_ranks: tuple[int, ...] = (0,)
    """Ranks that record; each writes a trace of its own."""
    profile_dir: Annotated[
        Path | None, tyro.conf.arg(aliases=["--profile-save-path"], metavar="DIR")
    ] = None
    """Folder for the traces, which TensorBoard shows; by default profile in --save."""
    profile_record_shapes: Flag = False
    """Record the shapes of operators' inputs."""
    profile_with_memory: Flag = False
    """Record allocations."""
    profile_with_stack: Flag = False
    """Record the Python lines that called."""
    profile_level: Literal["level_none", "level0", "level1", "level2"] = "level0"
    """How much of an npu's own events is recorded; the cores' metrics from level1 on."""

    def window(self) -> tuple[int, int] | None:
        """Steps before recording begins, and when it ends; None where nothing is recorded.

        Raises:
            UserError: --profile-steps is not of its form, or is given beside what it stands for.
        """
        one_by_one = (self.profile_step_start, self.profile_step_end)
        if self.profile_steps is not None:
            if one_by_one != (None, None):
                raise UserError(
                    "--profile-steps and --profile-step-start, --profile-step-end: give one."
                )
            if (found := re.fullmatch(r"(\d+):(\d+)", self.profile_steps)) is None:
                raise UserError(
                    f"--profile-steps {self.profile_steps} is not START:END, as in 10:12."
                )
            return int(found[1]), int(found[2])
        if not self.profile:
            return None
        start, end = one_by_one
        return 10 if start is None else start, 12 if end is None else end

    def range_faults(self, train_iters: int) -> list[str]:
        """What is wrong with the steps of a run of `train_iters`; 0 where that is not yet known."""
        window = self.window()
        if window is None:
            return []
        start, end = window
        if not 0 <= start < end:
            return [f"profiling from step {start} to {end}: the end must be above the start."]
        if 0 < train_iters < end:
            return [f"profiling from step {start} to {end}: the run has {train_iters} steps."]
        return []

    def folder(self, save: Path | None) -> Path | None:
        """Where traces go; None where nobody says it.

        Args:
            save: the run's folder for checkpoints.
        """
        if self.profile_dir is not None or save is None:
            return self.profile_dir
        return save / "profile"

    def faults(self, world_size: int, train_iters: int | None, save: Path | None) -> list[str]:
        """What cannot be recorded as asked for."""
        try:
            window = self.window()
        except UserError as error:
            return list(error.faults)
        if window is None:
            return [
                f"{flag} needs --profile-steps, as in 10:12, or --profile."
                for flag in given_flags(self)
            ]
        faults = [
            f"--profile-ranks {rank}: the ranks are 0 to {world_size - 1}."
            for rank in self.profile_ranks
            if not 0 <= rank < world_size
        ]
        if not self.profile_ranks:
            faults.append("--profile-ranks: name at least one rank.")
        if (folder := self.folder(save)) is None:
            faults.append("profiling needs --profile-dir, or --save: where would the trace go?")
        elif fault := folder_fault(folder):
            faults.append(f"--profile-dir {folder}: {fault}.")
        return faults + self.range_faults(train_iters or 0)


def folder_fault(folder: Path) -> str | None:
    """Why nothing can be written into a folder that may not be there yet; None when it can."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        return f"{there} is no folder"
    return None if os.access(there, os.W_OK | os.X_OK) else f"{there} may not be written into"
