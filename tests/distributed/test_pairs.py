"""Every two flags work together, or are refused in words.

PAIRS_SEED chooses the rows; PAIRS_ROWS how many of each kind and number of ranks, 0 for all.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from distributed import pairs
from distributed.harness import each_check
from distributed.pairs_worker import CHECKS

WORKER = Path(__file__).with_name("pairs_worker.py")
ODD = (0, -1, 3, 10**9)


@pytest.mark.parametrize("kind", pairs.KINDS)
def test_every_flag_has_values_to_try(kind: str) -> None:
    assert pairs.unknown_flags(pairs.KINDS[kind]) == []
    tried = {*pairs.KINDS[kind].values, *pairs.KINDS[kind].base}
    assert not tried - set(pairs.flags_of(pairs.KINDS[kind].settings))


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_the_rules_answer_every_pair(kind: str) -> None:
    """Odd values too raise a UserError, or none; `is_allowed` lets everything else through."""
    of = pairs.KINDS[kind]
    values = [*pairs.assignments(of), *_odd(of)]
    answers = [
        pairs.is_allowed(of, row, world_size=4)
        for one, other in combinations(values, 2)
        if (row := pairs.merged(one, other)) is not None
    ]
    assert 0.2 < sum(answers) / len(answers) < 0.9


def _odd(kind: pairs.Kind) -> list[pairs.Row]:
    """Numbers that no one means."""
    numbers = [
        flag
        for flag, tried in kind.values.items()
        if isinstance(tried[0], int | float) and not isinstance(tried[0], bool)
    ]
    return [{flag: odd} for flag in numbers for odd in ODD]


test_a_job_with_many_flags_trains_as_the_plain_one = each_check(WORKER, CHECKS)
