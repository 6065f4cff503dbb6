"""Tokens to text while they come: characters over several tokens, and strings that end the text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

UNFINISHED = "\ufffd"
"""What a decoder gives for the first bytes of a character whose others are in later tokens."""
LONGEST_WAIT = 16
"""Tokens after which bytes that make no character are given as they are.

A character has 4 bytes at most, but a token can end one and begin the next."""


class TextStream:
    """Turns one sequence's tokens into pieces of text, each as soon as it is settled.

    Args:
        decode: token ids to text; that of a piece of a sequence is a piece of its text, but for
            characters that are cut.
        stop: strings that end the text, which ends before the one that is complete first.
        special_tokens: those that `decode` leaves out, with what stands for them in `stop`.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stop: Sequence[str] = (),
        special_tokens: Mapping[int, str] | None = None,
    ) -> None:
        self._decode = decode
        self._stop = [text for text in stop if text]
        self._special_tokens = (special_tokens or {}) if self._stop else {}
        self._hidden: list[tuple[int, int]] = []
        """Where special tokens are in `_text`, which are searched and not given."""
        self._tokens: list[int] = []
        self._text = ""
        self._given = 0
        self._settled = self._begin = 0
        self.stopped: str | None = None
        """The string that ended the text."""

    @property
    def text(self) -> str:
        """All that was given so far."""
        return self._shown(0, self._given)

    def add(self, token: int) -> str:
        """Takes a token; what is now certain of the text after what was given before."""
        special = self._special_tokens.get(token)
        if special is not None:
            self._extend(final=True)
        self._tokens.append(token)
        if special is None:
            self._extend()
        elif self.stopped is None:
            start = len(self._text)
            self._hidden.append((start, start + len(special)))
            self._begin = self._settled = len(self._tokens)
            self._append(special)
        return self._give(len(self._text) - self._held_back())

    def end(self) -> str:
        """The rest, when no more tokens come."""
        self._extend(final=True)
        return self._give(len(self._text))

    def _extend(self, final: bool = False) -> None:
        """Decodes the newest tokens together with the last settled ones.

        Some decoders treat the first token of a sequence in a way of its own; the ones before it
        keep it from being the first.
        """
        if self.stopped is not None:
            return
        before = self._decode(self._tokens[self._begin : self._settled])
        now = self._decode(self._tokens[self._begin :])
        waiting = len(self._tokens) - self._settled
        if now.endswith(UNFINISHED) and waiting < LONGEST_WAIT and not final:
            return
        self._begin, self._settled = self._settled, len(self._tokens)
        self._append(now[len(before) :])

    def _append(self, piece: str) -> None:
        """Adds to the text, which ends before a stop string that is complete now."""
        searched = max(0, len(self._text) - max(map(len, self._stop), default=1) + 1)
        self._text += piece
        places = [(self._text.find(stop, searched), stop) for stop in self._stop]
        if ends := [(at + len(stop), at, stop) for at, stop in places if at >= 0]:
            _, at, self.stopped = min(ends)
            self._text = self._text[:at]

    def _held_back(self) -> int:
        """Characters at the end that may be the beginning of a string that ends the text."""
        if self.stopped is not None:
            return 0
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._text)), longest, -1):
                if self._text.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _give(self, up_to: int) -> str:
        piece = self._shown(self._given, up_to)
        self._given = max(self._given, up_to)
        return piece

    def _shown(self, start: int, end: int) -> str:
        """The text from `start` to `end` without special tokens."""
        pieces = []
        for first, last in self._hidden:
            pieces.append(self._text[start : max(start, min(first, end))])
            start = max(start, last)
        return "".join([*pieces, self._text[start:end]])
