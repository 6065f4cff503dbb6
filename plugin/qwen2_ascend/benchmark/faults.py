"""What can be wrong with options that several benchmarks have, in words for the user."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from qwen2_ascend.flags import number_faults

DTYPES = ("fp32", "bf16")


def dtype_faults(dtypes: Sequence[str]) -> list[str]:
    """The faults of `--dtypes`."""
    return [f"--dtypes {dtype} is not fp32 or bf16." for dtype in dtypes if dtype not in DTYPES]


def side_faults(sides: Sequence[str], known: Sequence[str]) -> list[str]:
    """The faults of `--sides`."""
    return [
        f"--sides {side} is not one of {', '.join(known)}." for side in sides if side not in known
    ]


def count_faults(options: Any, *names: str) -> list[str]:
    """The faults of options that must be at least 1, or all of whose numbers must."""
    values = {name: getattr(options, name) for name in names}
    least = {k: min(v, default=0) if isinstance(v, tuple) else v for k, v in values.items()}
    return number_faults(SimpleNamespace(**least), at_least_one=names)


def chosen_device(name: str) -> str:
    """The device that --device names; `auto` takes the best one there is.

    Raises:
        UserError: it cannot be used.
    """
    from qwen2_ascend.runtime import select_device

    return select_device(None if name == "auto" else name)
