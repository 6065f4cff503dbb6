"""What `launch/align_qwen2.py` runs: flags, then the alignment, then the exit status."""

from __future__ import annotations

from collections.abc import Sequence

from qwen2_ascend.alignment.settings import AlignSettings, parse
from qwen2_ascend.cli import EXIT_FAILURE
from qwen2_ascend.launching import launched


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `launch/align_qwen2.py`.

    Args:
        arguments: the flags; sys.argv's without it.

    Returns:
        0 where both sides agree, 1 where they differ; else as `launched` has it.
    """
    verdicts = []
    status = launched(lambda: verdicts.append(_align(parse(arguments))))
    return status or (EXIT_FAILURE if False in verdicts else 0)


def _align(settings: AlignSettings) -> bool:
    from qwen2_ascend.alignment.align import align

    return align(settings)
