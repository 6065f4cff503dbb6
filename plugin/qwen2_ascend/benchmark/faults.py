"""What can be wrong with options that several benchmarks have, in words for the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

DTYPES = ("fp32", "bf16")


def dtype_faults(dtypes: Sequence[str]) -> list[str]:
    """The faults of `--dtypes`."""
    return [f"--dtypes {dtype} is not fp32 or bf16." for dtype in dtypes if dtype not in DTYPES]


def side_faults(sides: Sequence[str], known: Sequence[str]) -> list[str]:
    """The faults of `--sides`."""
    return [
        f"--sides {side} is not one of {', '.join(known)}." for side in sides if side not in known
    ]


def count_faults(counts: Mapping[str, int]) -> list[str]:
    """The faults of flags whose values must be at least 1."""
    return [f"{name} {n} must be at least 1." for name, n in counts.items() if n < 1]
