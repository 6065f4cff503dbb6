"""What a training checkpoint says of its run, read before torch and megatron-core are imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2_ascend.checkpoint.formats import megatron, torch_dist, torch_pt


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A training checkpoint, as far as it is the same on every rank."""

    folder: Path
    """Of the iteration."""
    common: Mapping[str, Any]

    @property
    def has_optimizer(self) -> bool:
        return bool(self.common["contents"]["optimizer"])

    @property
    def padded_vocab_size(self) -> int:
        return self.common["args"].padded_vocab_size


def find_saved_run(folder: Path) -> SavedRun | None:
    """The training state in a Megatron folder, or None where it holds weights only.

    Raises:
        UserError: the folder is damaged.
    """
    iteration = megatron.iteration_folder(folder)
    if megatron.is_torch_dist(iteration):
        common = torch_dist.read(iteration).common
    else:
        files = sorted(iteration.glob(f"mp_rank_*/{megatron.PT_FILE}"))
        common = torch_pt.read(files[0]) if files else None
    if not isinstance(common, Mapping) or not {"progress", "contents"} <= common.keys():
        return None
    return SavedRun(folder=iteration, common=common)
