"""Which base model a LoRA run's adapters are for: told by a few bytes, kept in each checkpoint.

Adapters are of use on the weights that they were trained on alone. The folder of these may have
moved on since, or another may be named.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2_ascend.checkpoint.sample import may_be_same, sample_of
from qwen2_ascend.errors import UserError

if TYPE_CHECKING:
    from qwen2_ascend.checkpoint.readers.base import Source
    from qwen2_ascend.finetuning.saved_lora import SavedLora
    from qwen2_ascend.training.plan import RunPlan

logger = logging.getLogger(__name__)

MARK = "base_model"
"""What a checkpoint calls it."""


def base_marks(plan: RunPlan) -> Mapping[str, Any]:
    """What the checkpoints of a LoRA run say of its base model; nothing where that is random."""
    return {} if plan.source is None else {MARK: sample_of(plan.source.held)}


def base_folder(given: Path | None, saved: SavedLora) -> Path | None:
    """Where the base model of a resumed run is: in what --pretrained-checkpoint names, if that is
    said.

    That may be a run's folder with newer iterations than the one that the adapters began on.
    """
    if given is None or saved.base is None or not saved.base.exists():
        return given or saved.base
    return saved.base if saved.base.resolve().is_relative_to(given.resolve()) else given


def require_same_base(saved: SavedLora, source: Source) -> None:
    """Refuses to go on with adapters on weights that they were not trained on.

    A checkpoint of an older release says only where its base was.

    Raises:
        UserError: with the way out.
    """
    was, now = saved.state.get(MARK), sample_of(source.held)
    if was == now:
        return
    if was is not None and not may_be_same(was, now):
        raise UserError(
            f"{source.folder}: is not the base model that the adapters in {saved.folder} were "
            f"trained on ({saved.base} as it was then): the weights have other values. Name that "
            "model with --pretrained-checkpoint, or begin a new run on this one with "
            f"{saved.start_anew(source.folder)} and another --save."
        )
    if saved.base is not None and source.folder.resolve() != saved.base.resolve():
        logger.info(f"base model: {source.folder}; the adapters began on {saved.base}")
