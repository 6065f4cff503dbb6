"""Generator: many prompts through one engine, a row of its cache each; rows are used again.

Every rank runs the same loop over the same numbers: the engine gives each of them the same tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qwen2_ascend.inference.sampling import Place, Sampling, choose, sequence_generator
from qwen2_ascend.inference.text import TextStream
from qwen2_ascend.model.kv_cache import NewTokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qwen2_ascend.inference.engine import Engine

PREFILL_TOKENS = 8192
"""Tokens of prompts that go through the model at once, unless a single prompt has more."""

OnText = Callable[[int, str], None]
"""Called with a request's index and the next piece of its text."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue."""

    index: int
    """Its place in the order of results, and its share of the seed."""
    tokens: Sequence[int]
    max_new_tokens: int
    stop: Sequence[str] = ()
    """Further strings that end this one's text."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What became of a request."""

    index: int
    text: str
    """The text without special tokens, and without the string that ended it."""
    tokens: list[int]
    """The new tokens, with the one that ended the text."""
    finish_reason: str
    """ "eos", "stop" (a stop string) or "length"."""


@dataclass(kw_only=True)
class _Sequence:
    """A request in a row of the cache."""

    request: Request
    stream: TextStream
    random: torch.Generator
    process: Callable[[Tensor, Tensor], Tensor]
    tokens: list[int] = field(default_factory=list)

    @property
    def cached(self) -> int:
        """Tokens in the cache once the newest is: all but that one."""
        return len(self.request.tokens) + len(self.tokens) - 1


class Generator:
    """Continues prompts.

    Args:
        engine: this rank's; its cache's rows bound how many sequences are worked on at once.
        decode: token ids to text, without special tokens.
        eos_tokens: those that end a sequence.
        sampling: how a token is chosen.
        stop: strings that end the text.
        special_tokens: those that `decode` leaves out, and what they are called in `stop`.
        seed: the seed of the draws.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        decode: Callable[[list[int]], str],
        eos_tokens: Collection[int],
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        special_tokens: Mapping[int, str] | None = None,
        seed: int = 1234,
    ) -> None:
        self.engine = engine
        self.sampling = sampling or Sampling()
        self._decode = decode
        self._eos_tokens = frozenset(eos_tokens)
        self._stop = tuple(stop)
        self._special_tokens = special_tokens or {}
        self._seed = seed
        self._held: list[int] = []
        """What row 0 holds, while it is the only one: the beginning of the next turn of a chat."""

    def run(
        self, requests: Sequence[Request], on_text: OnText | None = None
    ) -> Iterator[Completion]:
        """Continues all of `requests`; each is given as soon as it has ended, in any order.

        Args:
            requests: prompts of at least one token that fit the model's context with their new
                tokens.
            on_text: told of every piece of text as it comes.
        """
        if not requests:
            return
        self.engine.reserve(max(len(r.tokens) + r.max_new_tokens for r in requests))
        pending, active = deque(requests), []
        while pending or active:
            if admitted := self._admit(pending, len(active)):
                found = self._prefill(admitted, len(active))
                active += admitted
                first = len(active) - len(admitted)
            else:
                found, first = self._decode_step(active), 0
            # from the last row down: the row that moves into a free one has had its turn
            for row in range(len(active) - 1, first - 1, -1):
                done = self._accept(active[row], found[row - first], on_text)
                if done is not None:
                    self._free(active, row)
                    yield done

    def _admit(self, pending: deque[Request], num_active: int) -> list[_Sequence]:
        """The next requests that have room."""
        admitted: list[_Sequence] = []
        budget = PREFILL_TOKENS
        while pending and num_active + len(admitted) < self.engine.cache.num_rows:
            budget -= len(pending[0].tokens)
            if admitted and budget < 0:
                break
            request = pending.popleft()
            assert request.tokens and request.max_new_tokens > 0, request
            admitted.append(self._sequence(request))
        return admitted

    def _sequence(self, request: Request) -> _Sequence:
        place = Place(
            prompt=request.tokens,
            max_new_tokens=request.max_new_tokens,
            eos_tokens=sorted(self._eos_tokens),
            device=str(self.engine.device),
        )
        stop = (*self._stop, *request.stop)
        return _Sequence(
            request=request,
            stream=TextStream(self._decode, stop, self._special_tokens),
            random=sequence_generator(self._seed, request.index),
            process=self.sampling.processors(place),
        )

    def _prefill(self, admitted: list[_Sequence], first_row: int) -> list[int]:
        prompts = [sequence.request.tokens for sequence in admitted]
        starts = [0] * len(admitted)
        if self.engine.cache.num_rows == 1:
            starts = [_common_length(self._held, prompts[0])]
        counts = [len(tokens) - start for tokens, start in zip(prompts, starts, strict=True)]
        tokens = [t for ids, start in zip(prompts, starts, strict=True) for t in ids[start:]]
        rows = range(first_row, first_row + len(admitted))
        return self._next(tokens, NewTokens(rows, starts, counts), admitted)

    def _decode_step(self, active: list[_Sequence]) -> list[int]:
        tokens = [sequence.tokens[-1] for sequence in active]
        starts = [sequence.cached for sequence in active]
        new = NewTokens(range(len(active)), starts, [1] * len(active))
        return self._next(tokens, new, active)

    def _next(self, tokens: list[int], new: NewTokens, sequences: list[_Sequence]) -> list[int]:
        if self.sampling.is_plain_greedy:
            return self.engine.next_tokens(tokens, new)

        def chosen(logits: Tensor) -> list[int]:
            held = [[*s.request.tokens, *s.tokens] for s in sequences]
            processors = [s.process for s in sequences]
            return choose(logits, self.sampling, held, processors, [s.random for s in sequences])

        return self.engine.next_tokens(tokens, new, chosen)

    def _accept(self, sequence: _Sequence, token: int, on_text: OnText | None) -> Completion | None:
        """Takes the sequence's next token; what became of it if that was the last."""
        request, stream = sequence.request, sequence.stream
        sequence.tokens.append(token)
        reason = None
        piece = ""
        if token in self._eos_tokens:
            reason = "eos"
        else:
            piece = stream.add(token)
            if len(sequence.tokens) == request.max_new_tokens:
                reason = "length"
        if reason:
            piece += stream.end()
        if stream.stopped is not None:
            reason = "stop"
        if on_text and piece:
            on_text(request.index, piece)
        if reason is None:
            return None
        return Completion(
            index=request.index, text=stream.text, tokens=sequence.tokens, finish_reason=reason
        )

    def _free(self, active: list[_Sequence], row: int) -> None:
        """Takes a sequence out; the last one moves into its row, so that rows have no holes."""
        done, last = active[row], active.pop()
        if self.engine.cache.num_rows == 1:
            self._held = [*done.request.tokens, *done.tokens[:-1]]
        if last is not done:
            self.engine.cache.move(len(active), row, last.cached)
            active[row] = last


def _common_length(held: Sequence[int], tokens: Sequence[int]) -> int:
    """Tokens at the beginning that need not be computed again; the last one always is."""
    limit = min(len(held), len(tokens) - 1)
    return next((i for i in range(limit) if held[i] != tokens[i]), limit)
