"""Which base model a LoRA run's adapters are for: told by a few bytes, kept in each checkpoint.

Adapters are of use on the weights that they were trained on alone. The folder of these may have
moved on since, or another may be named.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from qwen2_ascend.errors import UserError
from qwen2_ascend.files import open_regular, reading

if TYPE_CHECKING:
    from qwen2_ascend.checkpoint.readers.base import Source
    from qwen2_ascend.finetuning.saved_lora import SavedLora
    from qwen2_ascend.training.plan import RunPlan

logger = logging.getLogger(__name__)

MARK = "base_model"
"""What a checkpoint calls it."""
NUM_TENSORS, NUM_BYTES = 64, 4096
"""So many tensors of a model are looked at, and so much of each."""


def base_marks(plan: RunPlan) -> Mapping[str, Any]:
    """What the checkpoints of a LoRA run say of its base model; nothing where that is random."""
    return {} if plan.source is None else {MARK: sample_of(plan.source)}


def sample_of(source: Source) -> dict[str, str]:
    """Hashes of how the tensors are stored, and of the first bytes of some.

    The latter are compared only where the former are the same: in another format or layout the same
    weights have other bytes in these places.
    """
    held = sorted(source.held, key=lambda one: (one.name, one.piece.box))
    listed = [(one.name, one.piece.box, one.stored.dtype) for one in held]
    stored_as = xxhash.xxh3_64(repr(listed).encode())
    values = xxhash.xxh3_64()
    for one in held[:: -(-len(held) // NUM_TENSORS)]:
        with reading(one.stored.path), open_regular(one.stored.path) as file:
            file.seek(one.stored.offset)
            values.update(file.read(min(one.stored.num_bytes, NUM_BYTES)))
    return {"stored_as": stored_as.hexdigest(), "values": values.hexdigest()}


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
    was, now = saved.state.get(MARK), sample_of(source)
    if was == now:
        return
    if was is not None and was["stored_as"] == now["stored_as"]:
        raise UserError(
            f"{source.folder}: is not the base model that the adapters in {saved.folder} were "
            f"trained on ({saved.base} as it was then): the weights have other values. Name that "
            "model with --pretrained-checkpoint, or begin a new run on this one with --load "
            f"{source.folder} --lora-load {saved.folder} and another --save."
        )
    if saved.base is not None and source.folder.resolve() != saved.base.resolve():
        logger.info(f"base model: {source.folder}; the adapters began on {saved.base}")
