"""A chat of many turns on the terminal, or with a pipe that has a message on each line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qwen2_ascend.inference.communication import from_rank_zero
from qwen2_ascend.inference.generator import Completion, Generator, Request
from qwen2_ascend.inference.settings import GenerateSettings
from qwen2_ascend.runtime import current

if TYPE_CHECKING:
    from qwen2_ascend.inference.tokenizer import Tokenizer

PROMPT = "> "


def chat(
    generator: Generator,
    tokenizer: Tokenizer,
    settings: GenerateSettings,
    max_new_tokens: Callable[[int], int],
) -> None:
    """Answers each line of rank 0's standard input, until it ends or says /exit.

    What the cache holds of the chat so far is not computed again.
    """
    system = settings.prompts.system_prompt
    beginning = [] if system is None else [{"role": "system", "content": system}]
    messages: list[dict[str, Any]] = list(beginning)
    turn = 0
    while (line := from_rank_zero(_read_line(), current().device)) is not None:
        if line.strip() == "/exit":
            break
        if line.strip() == "/reset":
            messages = list(beginning)
            continue
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        tokens = tokenizer.encode_chat(messages)
        room = generator.engine.config.max_position_embeddings - len(tokens)
        room = min(room, max_new_tokens(len(tokens)))
        if room < 1:
            _show(
                f"[the chat has {len(tokens)} tokens, more than the model's context; "
                "/reset begins anew]\n"
            )
            messages.pop()
            continue
        request = Request(index=turn, tokens=tokens, max_new_tokens=room)
        answer = _answer(generator, request)
        messages.append({"role": "assistant", "content": answer.text})
        turn += 1


def _answer(generator: Generator, request: Request) -> Completion:
    (answer,) = generator.run([request], lambda _, piece: _show(piece))
    _show("\n")
    return answer


def _read_line() -> str | None:
    """Rank 0's next line without its end; None at the end of the input, and on other ranks."""
    if current().rank != 0:
        return None
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    import readline  # noqa: F401  # input() then edits lines and remembers them

    try:
        return input(PROMPT)
    except EOFError:
        _show("\n")
        return None


def _show(piece: str) -> None:
    if current().rank == 0:
        sys.stdout.write(piece.encode("utf-8", "replace").decode("utf-8"))
        sys.stdout.flush()
