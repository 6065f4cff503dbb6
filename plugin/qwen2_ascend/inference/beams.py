"""Beam search, as transformers has it: the likeliest of the continuations that several rows try.

Every rank goes through the same steps over the same numbers: the last stage finds the candidates
and tells the others. The rows of the cache are two banks; a step copies the rows that live on from
one bank to the other, so none is written over before it is read.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qwen2_ascend.errors import UserError
from qwen2_ascend.inference import communication
from qwen2_ascend.inference.engine import Engine, not_finite
from qwen2_ascend.inference.sampling import Place, Sampling, sequence_generator
from qwen2_ascend.model.kv_cache import NewTokens


class Beam(NamedTuple):
    """A continuation."""

    tokens: tuple[int, ...]
    score: float
    """The sum of its tokens' log-probabilities."""
    parent: int = 0
    """The place, among the beams of the step before, of the one that it goes on from."""

    @property
    def mean(self) -> float:
        """The score per token, which is what continuations of unlike length are compared by."""
        return self.score / len(self.tokens)


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """How the candidates of a step are chosen."""

    num_candidates: int
    sampling: Sampling
    place: Place
    random: torch.Generator

    def of(self, logits: Tensor, beams: Sequence[Beam]) -> Tensor:
        """`[num_candidates, 2]`, the best first: score, and place in beams times vocabulary.

        Args:
            logits: `[beams, vocabulary]` in fp32.
            beams: what they continue.
        """
        scores = logits.log_softmax(dim=-1)
        process = self.sampling.processors(self.place)
        rows = []
        for beam, row in zip(beams, scores, strict=True):
            held = torch.tensor([[*self.place.prompt, *beam.tokens]], device=logits.device)
            rows.append(process(held, row[None].clone()))
        scores = torch.cat(rows)
        if self.sampling.do_sample:
            for warp in self.sampling.warpers(str(logits.device)):
                scores = warp(None, scores)
        sums = torch.tensor([beam.score for beam in beams], device=logits.device)
        flat = (scores + sums[:, None]).flatten()
        places = self._places(flat)
        order = flat[places].argsort(descending=True, stable=True)
        return torch.stack((flat[places], places.float()), dim=1)[order]

    def _places(self, flat: Tensor) -> Tensor:
        """The candidates' places: the best ones, or draws without repetition."""
        count = min(self.num_candidates, flat.numel())
        if not self.sampling.do_sample:
            return flat.topk(count).indices
        weights = flat.cpu().double().softmax(dim=0)
        count_drawn = min(count, int((weights > 0).sum()))
        drawn = weights.multinomial(count_drawn, generator=self.random)
        rest = weights.argsort()[: count - count_drawn]  # of no weight; they are left out later
        return torch.cat((drawn, rest)).to(flat.device)


class _Ended:
    """The best continuations that have ended."""

    def __init__(self, num_beams: int) -> None:
        self._num_beams = num_beams
        self.beams: list[Beam] = []

    def add(self, beam: Beam) -> None:
        self.beams = sorted((*self.beams, beam), key=lambda one: -one.mean)[: self._num_beams]

    def cannot_be_beaten(self, best: float, length: int) -> bool:
        """Whether no beam can still become better than the worst of these."""
        return len(self.beams) == self._num_beams and self.beams[-1].mean >= best / length


def beam_search(
    engine: Engine,
    prompt: Sequence[int],
    *,
    num_beams: int,
    max_new_tokens: int,
    eos_tokens: Collection[int],
    sampling: Sampling,
    seed: int,
) -> tuple[int, ...]:
    """The best continuation of one prompt, with the token that ended it; the same on every rank.

    Args:
        engine: with twice as many rows as beams.
        prompt: at least one token; it fits the model's context with its new tokens.
        num_beams: continuations that are tried at once.
        max_new_tokens: at least one.
        eos_tokens: those that end a continuation.
        sampling: what changes the probabilities, and whether candidates are drawn.
        seed: the seed of the draws.

    Raises:
        UserError: logits are not finite.
    """
    assert engine.cache.num_rows >= 2 * num_beams, engine.cache.num_rows
    engine.reserve(len(prompt) + max_new_tokens)
    choice = _Choice(
        # so many that beams are left whichever of them end the text
        num_candidates=max(2, 1 + len(eos_tokens)) * num_beams,
        sampling=sampling,
        place=Place(
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            eos_tokens=sorted(eos_tokens),
            device=str(engine.device),
        ),
        random=sequence_generator(seed, 0),
    )
    ended, beams, bank = _Ended(num_beams), [Beam((), 0.0)], 0
    tokens, new = list(prompt), NewTokens(range(1), [0], [len(prompt)])
    while beams:
        found = _candidates(engine, tokens, new, choice, beams)
        beams = _next_beams(found, ended, eos_tokens, num_beams)
        length = len(found[0].tokens)
        if length == max_new_tokens or ended.cannot_be_beaten(found[0].score, length):
            break
        cached = len(prompt) + length - 1
        bank, source = num_beams - bank, bank
        for row, beam in enumerate(beams):
            engine.cache.move(source + beam.parent, bank + row, cached)
        tokens = [beam.tokens[-1] for beam in beams]
        rows = range(bank, bank + len(beams))
        new = NewTokens(rows, [cached] * len(beams), [1] * len(beams))
    for beam in beams:
        ended.add(beam)
    return ended.beams[0].tokens


def _next_beams(
    found: Sequence[Beam],
    ended: _Ended,
    eos_tokens: Collection[int],
    num_beams: int,
) -> list[Beam]:
    """The candidates that go on; those that end the text are taken if they are among the best."""
    going_on: list[Beam] = []
    for rank, beam in enumerate(found):
        if beam.tokens[-1] in eos_tokens:
            if rank < num_beams:
                ended.add(beam)
        elif len(going_on) < num_beams:
            going_on.append(beam)
    return going_on


def _candidates(
    engine: Engine, tokens: Sequence[int], new: NewTokens, choice: _Choice, beams: Sequence[Beam]
) -> list[Beam]:
    """What may come next, the best first."""
    logits = engine.last_logits(tokens, new)
    pairs = None
    if logits is not None:
        if logits.isfinite().all():
            pairs = choice.of(logits, beams)
        else:
            pairs = torch.full((choice.num_candidates, 2), torch.nan, device=engine.device)
    shape = (min(choice.num_candidates, len(beams) * engine.config.vocab_size), 2)
    pairs = communication.shared_by_last_stage(pairs, shape, engine.device)
    if pairs.isnan().any():
        raise UserError(not_finite(engine.dtype))
    found = []
    for score, place in pairs.tolist():
        parent, token = divmod(int(place), engine.config.vocab_size)
        found.append(Beam((*beams[parent].tokens, token), score, parent))
    return [beam for beam in found if beam.score > -torch.inf]
