"""What a checkpoint of a ZeRO run says, read before torch and DeepSpeed are imported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2_ascend.checkpoint.formats import megatron
from qwen2_ascend.errors import UserError
from qwen2_ascend.files import read_bytes

RUN_FILE = "zero.json"


@dataclass(frozen=True, kw_only=True)
class SavedZero:
    """A checkpoint of a ZeRO run."""

    folder: Path
    """The iteration's folder, in Hugging Face's format."""
    state: Mapping[str, Any]
    """RUN_FILE."""


def find_saved_zero(folder: Path | None) -> SavedZero | None:
    """The last checkpoint of a ZeRO run in `folder`, or None where there is no such thing.

    Raises:
        UserError: it is damaged.
    """
    if folder is None:
        return None
    iteration = megatron.tracked_folder(folder)
    path = iteration / RUN_FILE
    if not path.exists():
        return None
    try:
        return SavedZero(folder=iteration, state=json.loads(read_bytes(path)))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); --finetune --load {iteration} starts from its "
            "weights."
        ) from None
