"""What `launch/generate_qwen2.py` runs: flags, then the texts, then the exit status.

The log goes to stderr, so that stdout has the texts only.
"""

from __future__ import annotations

from collections.abc import Sequence

from qwen2_ascend.inference.settings import GenerateSettings, parse
from qwen2_ascend.launching import launched


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `launch/generate_qwen2.py`; gives its exit status."""
    return launched(lambda: _generate(parse(arguments)), log="stderr")


def _generate(settings: GenerateSettings) -> None:
    from qwen2_ascend.inference.generate import generate

    generate(settings)
