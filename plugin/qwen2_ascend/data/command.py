"""`qwen2-ascend preprocess`: parses flags, then imports what does the work."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro

from qwen2_ascend.data.chat.preprocess import preprocess_chats
from qwen2_ascend.data.pasted import say_pasted, split_flags
from qwen2_ascend.data.preprocess import preprocess_texts
from qwen2_ascend.data.settings import PreprocessSettings


def main(argv: Sequence[str] | None = None) -> None:
    """Parses `argv` and preprocesses.

    Raises:
        UserError: settings or input that cannot be used.
    """
    words, pasted = split_flags(sys.argv[1:] if argv is None else argv)
    settings = tyro.cli(PreprocessSettings, args=words)
    say_pasted(pasted)
    preprocess(settings)


def preprocess(settings: PreprocessSettings) -> None:
    """Does what `settings` say and prints a summary.

    Raises:
        UserError: input, tokenizer or output cannot be used, or a bad row was met.
        OSError: the output cannot be written; finished parts are kept.
    """
    if settings.task == "pretrain":
        preprocess_texts(settings)
    else:
        preprocess_chats(settings)
