"""Draws tokens from logits, with transformers' own logits processors.

Which processors there are and in which order is written in two tables, as transformers' generate
puts them together. Draws are made on the host from a generator per sequence, so they depend on the
seed, the prompt's number and the position alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation import logits_process as lp

Ids = Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a sequence's processors are made for."""

    prompt: Ids
    max_new_tokens: int
    eos_tokens: Ids
    device: str = "cpu"

    @property
    def eos(self) -> Tensor:
        return torch.tensor(list(self.eos_tokens), device=self.device)

    @property
    def prompt_ids(self) -> Tensor:
        return torch.tensor([list(self.prompt)], device=self.device)


class Step(NamedTuple):
    """An option that changes logits."""

    name: str
    is_on: Callable[[Any], bool]
    make: Callable[[Any, Place], Any]


def _unless(*neutral: Any) -> Callable[[Any], bool]:
    return lambda value: value is not None and value not in neutral


def _below(limit: float) -> Callable[[Any], bool]:
    return lambda value: value is not None and value < limit


def _inside(value: Any) -> bool:
    return value is not None and 0 < value < 1


PROCESSORS = (
    Step("sequence_bias", _unless(), lambda v, at: lp.SequenceBiasLogitsProcessor(v)),
    Step(
        "encoder_repetition_penalty",
        _unless(1.0),
        lambda v, at: lp.EncoderRepetitionPenaltyLogitsProcessor(v, at.prompt_ids),
    ),
    Step("repetition_penalty", _unless(1.0), lambda v, at: lp.RepetitionPenaltyLogitsProcessor(v)),
    Step("no_repeat_ngram_size", _unless(0), lambda v, at: lp.NoRepeatNGramLogitsProcessor(v)),
    Step(
        "encoder_no_repeat_ngram_size",
        _unless(0),
        lambda v, at: lp.EncoderNoRepeatNGramLogitsProcessor(v, at.prompt_ids),
    ),
    Step("bad_words_ids", _unless(), lambda v, at: lp.NoBadWordsLogitsProcessor(v, at.eos)),
    Step(
        "min_length",
        _unless(0),
        lambda v, at: lp.MinLengthLogitsProcessor(v, at.eos, device=at.device),
    ),
    Step(
        "min_new_tokens",
        _unless(0),
        lambda v, at: lp.MinNewTokensLengthLogitsProcessor(
            len(at.prompt), v, at.eos, device=at.device
        ),
    ),
    Step("forced_bos_token_id", _unless(), lambda v, at: lp.ForcedBOSTokenLogitsProcessor(v)),
    Step(
        "forced_eos_token_id",
        _unless(),
        lambda v, at: lp.ForcedEOSTokenLogitsProcessor(
            len(at.prompt) + at.max_new_tokens, v, device=at.device
        ),
    ),
    Step(
        "exponential_decay_length_penalty",
        _unless(),
        lambda v, at: lp.ExponentialDecayLengthPenalty(tuple(v), at.eos, len(at.prompt)),
    ),
    Step(
        "suppress_tokens",
        _unless([]),
        lambda v, at: lp.SuppressTokensLogitsProcessor(v, device=at.device),
    ),
    Step(
        "begin_suppress_tokens",
        _unless([]),
        lambda v, at: lp.SuppressTokensAtBeginLogitsProcessor(v, len(at.prompt), device=at.device),
    ),
)
"""What looks at the sequence; greedy generation has these too."""
WARPERS = (
    Step("temperature", _unless(1.0), lambda v, at: lp.TemperatureLogitsWarper(v)),
    Step("top_k", _unless(0), lambda v, at: lp.TopKLogitsWarper(v)),
    Step("top_p", _below(1.0), lambda v, at: lp.TopPLogitsWarper(v)),
    Step("min_p", _unless(), lambda v, at: lp.MinPLogitsWarper(v)),
    Step("typical_p", _below(1.0), lambda v, at: lp.TypicalLogitsWarper(v)),
    Step("epsilon_cutoff", _inside, lambda v, at: lp.EpsilonLogitsWarper(v)),
    Step("eta_cutoff", _inside, lambda v, at: lp.EtaLogitsWarper(v, device=at.device)),
)
"""What is left to draw from, whatever the sequence is."""
NAMES = ("do_sample", *(step.name for step in (*PROCESSORS, *WARPERS)))
"""Options of transformers' GenerationConfig that choose tokens here."""


class Sampling:
    """How a token is chosen; the defaults are greedy.

    Args:
        do_sample: draw; otherwise take the likeliest.
        options: others of NAMES, with the values that transformers' GenerationConfig has for them.
    """

    def __init__(self, *, do_sample: bool = False, **options: Any) -> None:
        steps = (*PROCESSORS, *(WARPERS if do_sample else ()))
        assert options.keys() <= set(NAMES), options.keys()
        self.do_sample = do_sample
        self.options: Mapping[str, Any] = {
            step.name: options[step.name] for step in steps if step.is_on(options.get(step.name))
        }
        self._warpers: list[Any] | None = None

    @property
    def is_plain_greedy(self) -> bool:
        return not self.do_sample and not self.options

    @property
    def looks_back(self) -> bool:
        """Whether the choice depends on the tokens before it."""
        return any(step.name in self.options for step in PROCESSORS)

    def processors(self, place: Place) -> Callable[[Tensor, Tensor], Tensor]:
        """What changes the logits of one sequence, from its tokens `[1, s]` and them `[1, v]`.

        Raises:
            ValueError, TypeError: transformers refuses a value.
        """
        made: Any = lp.LogitsProcessorList(self._made(PROCESSORS, place))
        return made

    def warpers(self, device: str) -> list[Any]:
        """What changes the logits of any sequence before a draw.

        Raises:
            ValueError, TypeError: transformers refuses a value.
        """
        if self._warpers is None:
            place = Place(prompt=(), max_new_tokens=0, eos_tokens=(), device=device)
            self._warpers = list(self._made(WARPERS, place))
        return self._warpers

    def _made(self, steps: Sequence[Step], place: Place) -> Iterator[Any]:
        for step in steps:
            if step.name in self.options:
                yield step.make(self.options[step.name], place)

    def describe(self) -> str:
        """A few words for a log."""
        listed = [
            f"{name.replace('_', '-' if 'top' in name else ' ')} {_short(self.options[name])}"
            for name in (step.name for step in (*WARPERS, *PROCESSORS))
            if name in self.options
        ]
        if self.do_sample and "temperature" not in self.options:
            listed.insert(0, "temperature 1")
        return ", ".join(["sampling" if self.do_sample else "greedy", *listed])


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return text if len(text) <= 40 else text[:40] + "..."


def choose(
    logits: Tensor,
    sampling: Sampling,
    sequences: Sequence[Ids],
    processors: Sequence[Callable[[Tensor, Tensor], Tensor]],
    generators: Sequence[torch.Generator],
) -> list[int]:
    """One token for each sequence.

    Args:
        logits: `[n, vocabulary]`, fp32.
        sampling: how.
        sequences: the tokens of each sequence, prompt included.
        processors: of each sequence, where `sampling.looks_back`.
        generators: one per sequence, on the CPU; each gives one draw.
    """
    if sampling.looks_back:
        rows = [
            process(torch.tensor([list(ids)], device=logits.device), row[None].clone())
            for ids, process, row in zip(sequences, processors, logits, strict=True)
        ]
        logits = torch.cat(rows)
    if not sampling.do_sample:
        return logits.argmax(dim=-1).tolist()
    scores, tokens = candidates(logits, sampling)
    # Beyond fp32: a running sum of 150,000 probabilities has to end at 1.
    heights = scores.cpu().double().softmax(dim=-1).cumsum(dim=-1)
    draws = [torch.rand(1, generator=g, dtype=torch.float64) for g in generators]
    places = torch.searchsorted(heights, torch.stack(draws) * heights[:, -1:], right=True)
    return tokens.cpu().gather(1, places.clamp(max=tokens.shape[1] - 1)).squeeze(1).tolist()


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """What may be drawn from `[n, vocabulary]`.

    Gives scores `[n, m]`, -inf for what is left out, and their tokens `[n, m]`, from the smallest
    id up.

    Only what top-k leaves is worked on after it and moved to the host. In the order of ids, a
    logit that is rounded in another way changes few draws, though it changes places with others.
    """
    tokens: Any = None
    for warp in sampling.warpers(str(logits.device)):
        logits = warp(tokens, logits)
        if isinstance(warp, lp.TopKLogitsWarper):  # tokens that tie with the k-th stay
            count = int((logits > -torch.inf).sum(dim=-1).max())
            tokens = logits.topk(count).indices.sort(dim=-1).values
            logits = logits.gather(-1, tokens)
    if tokens is None:
        tokens = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
    return logits, tokens


def sequence_generator(seed: int, index: int) -> torch.Generator:
    """The generator of the sequence with this number."""
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
