"""Scorer: log-probabilities of given tokens, with the vocabulary cut over the ranks.

The logits of a few thousand positions at a time exist, on each rank its own columns of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qwen2_ascend.errors import UserError
from qwen2_ascend.inference import communication
from qwen2_ascend.inference.engine import Engine, not_finite
from qwen2_ascend.model.kv_cache import NewTokens
from qwen2_ascend.vocabulary import check_tokens

LOGITS_AT_ONCE = 256
"""Positions whose logits exist at once: 160 MB in fp32 at 152,064 words."""


class Scored(NamedTuple):
    """One token that was asked for."""

    log_probability: float
    """Natural logarithm."""
    is_likeliest: bool
    """Whether greedy generation would have taken it."""


class Scorer:
    """Scores sequences in the rows of an engine's cache, as many at once as it has."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def score(
        self, sequences: Sequence[Sequence[int]], firsts: Sequence[int]
    ) -> list[list[Scored]]:
        """Scores the tokens of each sequence from its `first` on, given all that stand before them.

        Args:
            sequences: tokens, at least two, at most one more than the model's context.
            firsts: the place of the first token to score in each, at least 1.

        Returns:
            On every rank the same.

        Raises:
            UserError: a token that the model does not have, or logits that are not finite.
        """
        results: list[list[Scored]] = []
        self.engine.reserve(max(map(len, sequences), default=1) - 1)
        num_rows = self.engine.cache.num_rows
        for at in range(0, len(sequences), num_rows):
            batch = slice(at, at + num_rows)
            results += self._score_batch(sequences[batch], firsts[batch])
        return results

    @torch.inference_mode()
    def _score_batch(
        self, sequences: Sequence[Sequence[int]], firsts: Sequence[int]
    ) -> list[list[Scored]]:
        # the last token is only asked for: nothing comes after it
        counts = [len(sequence) - 1 for sequence in sequences]
        new = NewTokens(range(len(sequences)), [0] * len(sequences), counts)
        flat = [token for sequence in sequences for token in sequence[:-1]]
        check_tokens([sequence[-1] for sequence in sequences], self.engine.config.vocab_size)
        hidden = self.engine.hidden_states(flat, new)
        sizes = [len(s) - first for s, first in zip(sequences, firsts, strict=True)]
        pairs = None
        if hidden is not None:
            pairs = self._pairs(hidden.squeeze(1), sequences, firsts)
        shape = (sum(sizes), 2)
        pairs = communication.shared_by_last_stage(pairs, shape, self.engine.device)
        if not pairs.isfinite().all():
            raise UserError(not_finite(self.engine.dtype))
        scored = (Scored(value, bool(best)) for value, best in pairs.tolist())
        return [[next(scored) for _ in range(size)] for size in sizes]

    def _pairs(
        self, hidden: Tensor, sequences: Sequence[Sequence[int]], firsts: Sequence[int]
    ) -> Tensor:
        """`[n, 2]`: log-probability and whether it is the likeliest, of all that is asked for."""
        places, targets = [], []
        start = 0
        for sequence, first in zip(sequences, firsts, strict=True):
            places += range(start + first - 1, start + len(sequence) - 1)
            targets += sequence[first:]
            start += len(sequence) - 1
        device = hidden.device
        rows, wanted = torch.tensor(places, device=device), torch.tensor(targets, device=device)
        parts = zip(rows.split(LOGITS_AT_ONCE), wanted.split(LOGITS_AT_ONCE), strict=True)
        return torch.cat([self._part(hidden[row], token) for row, token in parts])

    def _part(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """`[n, 2]` of hidden states `[n, h]` and the tokens that follow them."""
        logits = self.engine.logits(hidden.unsqueeze(1)).squeeze(1)
        first = self.engine.first_column
        largest, columns = logits.max(dim=-1)
        best = communication.best_over_ranks(largest, columns, first)
        shift = communication.largest_over_ranks(largest)
        sums = (logits - shift[:, None]).exp().sum(dim=-1)
        own = targets - first
        is_here = (own >= 0) & (own < logits.shape[1])
        picked = logits.gather(1, own.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
        picked = torch.where(is_here, picked - shift, 0.0)
        sums, picked = communication.summed_over_ranks(torch.stack((sums, picked)))
        return torch.stack((picked - sums.log(), (best == targets).float()), dim=1)


def windows(num_tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first) of the windows that score each token but the first exactly once.

    Each window is `window` tokens and begins `stride` after the one before; what an earlier one has
    scored it reads as context only. This is the sliding window of transformers' documentation on
    perplexity: a token has at least window - stride tokens before it, but for those at the start.
    """
    scored = 1
    for begin in range(0, num_tokens, stride):
        end = min(begin + window, num_tokens)
        if end > scored:
            yield begin, end, scored
        scored = end
        if end == num_tokens:
            return
