"""What `launch/evaluate_qwen2.py` runs: flags, then the evaluation, then the exit status.

The log goes to stderr, the table to stdout.
"""

from __future__ import annotations

from collections.abc import Sequence

from qwen2_ascend.evaluation.settings import EvaluateSettings, parse
from qwen2_ascend.launching import launched


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `launch/evaluate_qwen2.py`; gives its exit status."""
    return launched(lambda: _evaluate(parse(arguments)), log="stderr")


def _evaluate(settings: EvaluateSettings) -> None:
    from qwen2_ascend.evaluation.evaluate import evaluate

    evaluate(settings)
