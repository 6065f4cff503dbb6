"""What --data-path and --split say of pretraining data, and whether that can be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from qwen2_ascend.data.index_files import check_indexed
from qwen2_ascend.errors import Faults, UserError, raise_if

SPLITS = ("train", "valid", "test")


class Blend(NamedTuple):
    """Indexed datasets and the share of samples drawn from each.

    Without weights the datasets go in whole, for one epoch, as in Megatron.
    """

    prefixes: list[str]
    weights: list[float] | None


def check_pretraining_data(
    *,
    data_path: Sequence[str],
    train_data_path: Sequence[str],
    valid_data_path: Sequence[str],
    split: str,
) -> None:
    """What can be said of the data before there is a process group; heads of files are read.

    Raises:
        UserError: files that are missing, unreadable, empty or damaged, wrong weights, a split
            that is none; every fault at once.
    """
    faults = Faults()
    if data_path:
        faults.collect(lambda: check_split(split))
    prefixes: dict[str, None] = {}
    for words in (data_path, train_data_path, valid_data_path):
        if words and (blend := faults.collect(partial(parse_blend, words))) is not None:
            prefixes |= dict.fromkeys(blend.prefixes)
    for prefix in prefixes:
        faults.collect(partial(check_indexed, prefix))
    raise_if(faults)


def parse_blend(words: Sequence[str]) -> Blend:
    """Reads `A`, `A B C` or `0.3 A 0.7 B`.

    Raises:
        UserError: weights for some datasets only, or weights that are not above zero.
    """
    numbers = [_number(word) for word in words[::2]]
    if all(number is None for number in numbers):
        return Blend(list(words), None)
    if len(words) % 2 or any(number is None for number in numbers):
        raise UserError(
            f"{' '.join(words)!r}: give prefixes only, or a weight before each: 0.3 A 0.7 B."
        )
    weights = [float(number) for number in numbers if number is not None]
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise UserError(f"{' '.join(words)!r}: each weight must be above zero.")
    return Blend(list(words[1::2]), weights)


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def check_split(split: str) -> None:
    """Whether it is up to three shares, one of them above none.

    Raises:
        UserError: it is not.
    """
    shares = [_number(word) for word in split.split(",")]
    if len(shares) > len(SPLITS) or any(n is None or not 0 <= n < math.inf for n in shares):
        raise UserError(f"split={split!r} must be up to three shares, such as 969,30,1.")
    if not any(shares):
        raise UserError(f"split={split!r} gives nothing to anyone; one share must be above zero.")
