"""What the flags of several commands have in common."""

from __future__ import annotations

from typing import Annotated

import tyro

from qwen2_ascend.errors import UserError

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
"""A flag without a value and without a --no- twin."""


def layer_list(text: str | None) -> tuple[int, ...] | None:
    """The layers of each pipeline stage, of --num-layer-list.

    Raises:
        UserError: it is not a list of numbers.
    """
    if not text:
        return None
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise UserError(
            f"--num-layer-list {text} is not a list of whole numbers such as 6,8,8,6."
        ) from None
