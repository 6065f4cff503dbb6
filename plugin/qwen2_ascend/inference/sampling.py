"""From logits to tokens: repetition penalty, temperature, top-k, top-p, and the draw.

The order and the arithmetic are those of transformers' logits processors. Draws are made on the
host from a generator per sequence, so a sequence's text depends on its seed and its prompt, not on
the device, the batch it is in or the number of ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen; the defaults are greedy."""

    do_sample: bool = False
    """Draw; otherwise take the likeliest."""
    temperature: float = 1.0
    """Logits are divided by it."""
    top_k: int = 0
    """Draw from so many likeliest; 0 for all."""
    top_p: float = 1.0
    """Draw from the likeliest whose probabilities sum to this."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens less likely that are in the sequence already; greedy too."""

    @property
    def is_plain_greedy(self) -> bool:
        return not self.do_sample and self.repetition_penalty == 1.0

    def describe(self) -> str:
        """In a few words, for a log."""
        words = ["greedy"]
        if self.do_sample:
            words = [f"sampling, temperature {self.temperature:g}"]
            words += [f"top-k {self.top_k}"] if self.top_k else []
            words += [f"top-p {self.top_p:g}"] if self.top_p < 1 else []
        if self.repetition_penalty != 1.0:
            words.append(f"repetition penalty {self.repetition_penalty:g}")
        return ", ".join(words)


class Candidates(NamedTuple):
    """What may be drawn, for n sequences: the m likeliest, and -inf for what is left out."""

    scores: Tensor
    """`[n, m]`"""
    tokens: Tensor
    """`[n, m]`"""


def choose(
    logits: Tensor,
    sampling: Sampling,
    seen: Sequence[Collection[int]],
    generators: Sequence[torch.Generator],
) -> list[int]:
    """One token for each sequence.

    Args:
        logits: `[n, vocabulary]`, fp32; may be changed.
        sampling: how.
        seen: the tokens that each sequence holds, prompt included.
        generators: one per sequence, on the CPU; each gives one draw.
    """
    penalize(logits, sampling.repetition_penalty, seen)
    if not sampling.do_sample:
        return logits.argmax(dim=-1).tolist()
    scores, tokens = candidates(logits, sampling)
    # Beyond fp32: a running sum of 150,000 probabilities has to end at 1.
    heights = scores.cpu().double().softmax(dim=-1).cumsum(dim=-1)
    draws = [torch.rand(1, generator=g, dtype=torch.float64) for g in generators]
    places = torch.searchsorted(heights, torch.stack(draws) * heights[:, -1:], right=True)
    return tokens.cpu().gather(1, places.clamp(max=tokens.shape[1] - 1)).squeeze(1).tolist()


def penalize(logits: Tensor, penalty: float, seen: Sequence[Collection[int]]) -> None:
    """Repetition penalty (Keskar et al. 2019, arXiv:1909.05858) in place."""
    if penalty == 1.0:
        return
    for row, tokens in zip(logits, seen, strict=True):
        ids = torch.tensor(list(tokens), device=logits.device)
        scores = row[ids]
        row[ids] = torch.where(scores < 0, scores * penalty, scores / penalty)


def candidates(logits: Tensor, sampling: Sampling) -> Candidates:
    """Temperature, top-k, top-p: what may be drawn from `[n, vocabulary]`.

    Only what top-k leaves is sorted and moved to the host. Tokens that tie with the k-th stay, so
    there may be more than k.
    """
    vocabulary = logits.shape[-1]
    scores = logits / sampling.temperature
    if not sampling.top_k and sampling.top_p >= 1:
        return Candidates(scores, torch.arange(vocabulary, device=logits.device).expand_as(scores))
    weakest, count = None, vocabulary
    if sampling.top_k:
        weakest = scores.topk(min(sampling.top_k, vocabulary)).values[:, -1:]
        count = int((scores >= weakest).sum(dim=-1).max())
    kept, tokens = scores.topk(count)
    if weakest is not None:
        kept = kept.masked_fill(kept < weakest, -torch.inf)
    if sampling.top_p < 1:
        # from the unlikeliest upwards, as transformers sums
        rising = kept.flip(-1).softmax(dim=-1).cumsum(dim=-1)
        drop = (rising <= 1 - sampling.top_p).flip(-1)
        drop[:, 0] = False
        kept = kept.masked_fill(drop, -torch.inf)
    return Candidates(kept, tokens)


def sequence_generator(seed: int, index: int) -> torch.Generator:
    """The generator of the sequence with this number."""
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
