"""What a rank keeps of a cut sequence for backward is its share of what is kept of a whole one."""

from __future__ import annotations

import pytest

from distributed.long_sequences import CHECKS, measure

LENGTH = 512
MEASURED = (
    "1 megatron_cp_algo",
    "2 megatron_cp_algo",
    "2 ulysses_cp_algo",
    "4 kvallgather_cp_algo",
)


@pytest.mark.distributed
def test_what_is_kept_falls_as_one_by_the_number_of_ranks() -> None:
    """The step computes the same loss."""
    found = measure(LENGTH, [check for check in CHECKS.all() if check.name in MEASURED])
    assert len(found) == len(MEASURED)
    whole = found[1, "megatron_cp_algo"]
    for (size, algorithm), own in found.items():
        assert max(own["kept"]) * size <= whole["kept"][0] * 1.02, (size, algorithm, found)
        assert max(own["kept"]) == min(own["kept"]), "ranks keep equal shares"
        assert abs(own["loss"] - whole["loss"]) <= 1e-6, (size, algorithm, found)
