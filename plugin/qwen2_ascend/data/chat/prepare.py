"""Files of chats, prepared when a run starts: once, by rank 0, and kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from qwen2_ascend.data.chat.settings import ChatSettings
from qwen2_ascend.errors import UserError

SUFFIXES = (".json", ".jsonl", ".ndjson", ".jl", ".parquet")


class Preparation(NamedTuple):
    """How files of chats are prepared."""

    task: str
    tokenizer: str | Path | None
    chat: ChatSettings
    on_bad_row: str
    data_cache_path: str | Path | None
    workers: int | None


def is_chat_file(word: str) -> bool:
    """Whether a word of --data-path is a file of chats, not a prefix."""
    return word.lower().removesuffix(".gz").endswith(SUFFIXES)


def prepared(words: Sequence[str], preparation: Preparation) -> dict[str, str]:
    """Of each word of --data-path its prefix; files of chats are prepared.

    Raises:
        UserError: a file cannot be prepared.
    """
    for word in words:
        if is_chat_file(word):
            raise UserError(
                f"--data-path {word}: prepare it with qwen2-ascend preprocess --task "
                f"{preparation.task} and give its prefix."
            )
    return {word: word for word in words}
