"""The model behind the Chat page, and its answers; `talking.py` is the process that has it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen2_ascend.errors import UserError
from qwen2_ascend.inference import opening
from qwen2_ascend.inference.generator import Request
from qwen2_ascend.inference.settings import SamplingSettings, ServedModelSettings
from qwen2_ascend.inference.text_settings import text_settings


class _Stopped(Exception):
    """The page wants no more of this answer."""


class Answerer:
    """A model that answers.

    Args:
        folder: what --load of generate_qwen2.py may name.
        write: writes a line of the answer.

    Raises:
        UserError: it is no model.
    """

    def __init__(self, folder: Path, write: Callable[..., None]) -> None:
        self._write = write
        self._stop = threading.Event()
        model = ServedModelSettings(load=folder)
        opened = opening.open_model(model)
        self._source = opened.source
        self._tokenizer = opening.open_tokenizer(model, self._source)
        self._folder = opening.config_folder(self._source)
        self._runtime, self._engine = opening.start_engine(model, opened, num_rows=1)
        self.description = f"{self._source.describe()}, {self._runtime.name}"

    def stop(self) -> None:
        """Ends the answer that is being given."""
        self._stop.set()

    def answer(self, question: dict[str, Any]) -> None:
        """Writes the pieces of the answer to a chat, and how it ended.

        Raises:
            UserError: the chat cannot be written, or leaves no room for an answer.
        """
        self._stop.clear()
        temperature = question.get("temperature")
        settings = SamplingSettings(
            max_new_tokens=question["max_new_tokens"],
            greedy=temperature == 0,
            temperature=temperature or None,
        )
        text = text_settings(settings, self._folder, self._tokenizer, is_chat=True)
        tokens = self._tokenizer.encode_chat(question["messages"])
        room = self._source.config.max_position_embeddings - len(tokens)
        room = min(room, text.max_new_tokens(len(tokens)))
        if room < 1:
            raise UserError(f"the chat has {len(tokens)} tokens, more than the model's context.")
        begin = time.monotonic()
        # a new one for each answer: one that was stopped is not to be gone on with
        generator = text.generator(self._engine, self._tokenizer)
        request = Request(index=0, tokens=tokens, max_new_tokens=room)
        number, reason = 0, "stopped"
        try:
            for done in generator.run([request], self._take):
                number, reason = len(done.tokens), done.finish_reason
        except _Stopped:
            pass
        self._write(done=reason, tokens=number, seconds=time.monotonic() - begin)

    def _take(self, _: int, piece: str) -> None:
        self._write(piece=piece)
        if self._stop.is_set():
            raise _Stopped
