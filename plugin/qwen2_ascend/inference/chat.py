"""A chat of many turns on the terminal, or with a pipe that has a message on each line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from qwen2_ascend.errors import UserError
from qwen2_ascend.inference.generator import Generator, Request
from qwen2_ascend.machine import rank

if TYPE_CHECKING:
    from qwen2_ascend.inference.tokenizer import Tokenizer

PROMPT = "> "
Messages = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How a chat is led."""

    tokenizer: Tokenizer
    is_plain: bool = False
    """Whether the texts stand one after the other, without a chat template."""
    system_prompt: str | None = None
    history_turns: int | None = None
    """Questions, with their answers, that the model sees before the newest; all by default."""
    ends: Sequence[str] = ("/exit",)
    """Lines that end the chat."""
    begins: Sequence[str] = ("/reset",)
    """Lines that begin it anew."""

    def encode(self, messages: Messages) -> list[int]:
        """A chat up to where the answer is to begin.

        Raises:
            UserError: the chat template refuses it, or there is none.
        """
        if self.is_plain:
            return self.tokenizer.encode("".join(message["content"] for message in messages))
        system = self.system_prompt
        beginning = [] if system is None else [{"role": "system", "content": system}]
        return self.tokenizer.encode_chat([*beginning, *messages])

    def remembered(self, messages: Messages) -> Messages:
        """The turns that the model still sees."""
        if self.history_turns is None:
            return messages
        return messages[max(0, len(messages) - 2 * self.history_turns) :]


def chat(generator: Generator, manner: Manner, max_new_tokens: Callable[[int], int]) -> None:
    """Answers each line of rank 0's standard input, until it ends or says so.

    What the cache of the generator, which has one row, holds of the chat so far is not computed
    again. `max_new_tokens` is asked with the number of a prompt's tokens.
    """
    messages: Messages = []
    turn = 0
    while (line := _from_rank_zero(_read_line(), generator.engine.device)) is not None:
        if line.strip() in manner.ends:
            break
        if line.strip() in manner.begins:
            messages = []
            continue
        if not line.strip():
            continue
        messages = [*manner.remembered(messages), {"role": "user", "content": line}]
        tokens = manner.encode(messages)
        room = generator.engine.config.max_position_embeddings - len(tokens)
        room = min(room, max_new_tokens(len(tokens)))
        if room < 1:
            show(
                f"[the chat has {len(tokens)} tokens, more than the model's context; "
                f"{manner.begins[0]} begins anew]\n"
            )
            messages.pop()
            continue
        request = Request(index=turn, tokens=tokens, max_new_tokens=room)
        (answer,) = generator.run([request], lambda _, piece: show(piece))
        show("\n")
        messages.append({"role": "assistant", "content": answer.text})
        turn += 1


def check_template(manner: Manner) -> None:
    """Tries a chat of one turn, before any process waits for another.

    Raises:
        UserError: the chat template refuses it, or there is none.
    """
    try:
        manner.encode([{"role": "user", "content": "?"}])
    except UserError as error:
        raise UserError(f"a chat cannot be written: {fault}" for fault in error.faults) from None


def _from_rank_zero(value: Any, device: torch.device) -> Any:
    """`value` of rank 0, any object that can be pickled, on every rank."""
    if distributed.get_world_size() == 1:
        return value
    holder = [value]
    distributed.broadcast_object_list(holder, 0, device=None if device.type == "cpu" else device)
    return holder[0]


def _read_line() -> str | None:
    """Rank 0's next line without its end; None at the end of the input, and on other ranks."""
    if rank() != 0:
        return None
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None

    try:
        return input(PROMPT)
    except EOFError:
        show("\n")
        return None


def show(piece: str) -> None:
    """Writes a piece of text to rank 0's standard output."""
    if rank() == 0:
        sys.stdout.write(piece.encode("utf-8", "replace").decode("utf-8"))
        sys.stdout.flush()
