"""Perplexity of a text: exp of the mean negative log-probability of its tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from qwen2_ascend.evaluation.scoring import Scorer, windows
from qwen2_ascend.evaluation.settings import EvaluateSettings
from qwen2_ascend.evaluation.table import Rows
from qwen2_ascend.inference.engine import Engine


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """What a text was found to be worth."""

    perplexity: float
    loss: float
    """Nats per token."""
    bits_per_byte: float
    """Comparable between tokenizers."""
    num_tokens: int
    """The tokens that were scored: all but the first."""


def perplexity(
    scorer: Scorer, tokens: Sequence[int], *, num_bytes: int, window: int, stride: int
) -> Perplexity:
    """Slides a window over `tokens`; see `windows` for which token is scored in which.

    Args:
        scorer: this rank's scorer; every rank gets the same result.
        tokens: at least two.
        num_bytes: bytes of the text, in UTF-8.
        window: tokens that are read at once.
        stride: tokens by which the window moves on.
    """
    sequences, firsts = [], []
    for begin, end, first in windows(len(tokens), window, stride):
        sequences.append(tokens[begin:end])
        firsts.append(first - begin)
    scored = [one.log_probability for row in scorer.score(sequences, firsts) for one in row]
    assert len(scored) == len(tokens) - 1
    total = -math.fsum(scored)
    loss = total / len(scored)
    return Perplexity(
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        loss=loss,
        bits_per_byte=total / math.log(2) / num_bytes,
        num_tokens=len(scored),
    )


def perplexities(
    settings: EvaluateSettings, engine: Engine, texts: Sequence[tuple[Path, list[int], int]]
) -> Rows:
    """Rows for the table.

    Args:
        settings: the window and its stride.
        engine: this rank's.
        texts: each one's file, tokens and number of bytes.
    """
    window, stride = settings.window(engine.config), settings.stride(engine.config)
    rows: Rows = []
    for path, tokens, num_bytes in texts:
        found = asdict(
            perplexity(Scorer(engine), tokens, num_bytes=num_bytes, window=window, stride=stride)
        )
        samples = found.pop("num_tokens")
        rows += [
            {
                "task": path.name,
                "metric": name,
                "value": value,
                "samples": samples,
                "window": window,
                "stride": stride,
            }
            for name, value in found.items()
        ]
    return rows
