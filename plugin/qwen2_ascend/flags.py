"""What the flags of several commands have in common."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any

import tyro

from qwen2_ascend.errors import UserError

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
"""A flag without a value and without a --no- twin."""

LAYOUT_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
)
"""The sizes of a ParallelLayout, which are flags of most commands."""


def number_faults(
    settings: Any,
    *,
    at_least_one: tuple[str, ...] = (),
    not_negative: tuple[str, ...] = (),
    above_zero: tuple[str, ...] = (),
) -> list[str]:
    """What is wrong with numbers of a command's settings, by their fields; None is no number."""
    rules = (
        (at_least_one, lambda value: value >= 1, "must be at least 1"),
        (not_negative, lambda value: value >= 0, "must not be below zero"),
        (above_zero, lambda value: value > 0, "must be above zero"),
    )
    return [
        f"{flag_of(name)} {value} {rule}."
        for names, holds, rule in rules
        for name in names
        if (value := getattr(settings, name)) is not None and not holds(value)
    ]


def flag_of(field: str) -> str:
    """The flag that sets a field: --micro-batch-size."""
    return f"--{field.replace('_', '-')}"


def given_flags(group: Any, names: Collection[str] | None = None) -> list[str]:
    """The flags of a group of settings, or of the named fields of it, whose values are no
    defaults."""
    return [
        flag_of(one.name)
        for one in fields(group)
        if (names is None or one.name in names) and getattr(group, one.name) != _default(one)
    ]


def _default(one: Field[Any]) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()


def layer_list(text: str | None) -> tuple[int, ...] | None:
    """The layers of each pipeline stage, of --num-layer-list.

    Raises:
        UserError: it is not a list of numbers, or leaves a stage without a layer.
    """
    if text is None:
        return None
    try:
        numbers = tuple(int(word) for word in text.split(","))
    except ValueError:
        raise UserError(
            f"--num-layer-list {text} is not a list of whole numbers such as 6,8,8,6."
        ) from None
    if min(numbers) < 1:
        raise UserError(f"--num-layer-list {text}: each stage needs at least 1 layer.")
    return numbers
