"""The process that holds a model and answers: questions in, pieces of answers out, a JSON a line.

    {"messages": [...], "max_new_tokens": 256, "temperature": 0.7}   in
    {"stop": true}                                                   in: ends the answer
    {"ready": "..."}   {"piece": "..."}   {"faults": [...]}          out
    {"done": "eos", "tokens": 12, "seconds": 0.5}                    out

`talker.Talker` starts it. Its standard error is for people.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TextIO

from qwen2_ascend.errors import UserError, printable
from qwen2_ascend.inference import opening
from qwen2_ascend.inference.settings import SamplingSettings, ServedModelSettings
from qwen2_ascend.log import shown_log


class _Stopped(Exception):
    """The page wants no more of this answer."""


class Answerer:
    """A model that answers.

    Args:
        folder: what --load of generate_qwen2.py may name.
        out: takes the answers' lines.

    Raises:
        UserError: it is no model.
    """

    def __init__(self, folder: Path, out: TextIO) -> None:
        self._out = out
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
        from qwen2_ascend.inference.generator import Request
        from qwen2_ascend.inference.text_settings import text_settings

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
        self.write(done=reason, tokens=number, seconds=time.monotonic() - begin)

    def _take(self, _: int, piece: str) -> None:
        self.write(piece=piece)
        if self._stop.is_set():
            raise _Stopped

    def write(self, **fields: Any) -> None:
        """Writes a line of the answer."""
        _write(self._out, **fields)


@shown_log("stderr")
def main() -> None:
    """Answers until the standard input ends."""
    # what libraries print goes to stderr; the answers have the standard output to themselves
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    questions: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
    try:
        answerer = Answerer(Path(sys.argv[1]), out)
    except Exception as error:
        _write_faults(out, error)
        return
    threading.Thread(target=_listen, args=(questions, answerer), daemon=True).start()
    answerer.write(ready=answerer.description)
    while (question := questions.get()) is not None:
        try:
            answerer.answer(question)
        except Exception as error:
            _write_faults(out, error)


def _listen(questions: SimpleQueue[dict[str, Any] | None], answerer: Answerer) -> None:
    for line in sys.stdin:
        message = json.loads(line)
        if message.get("stop"):
            answerer.stop()
        else:
            questions.put(message)
    answerer.stop()
    questions.put(None)


def _write_faults(out: TextIO, error: Exception) -> None:
    faults = error.faults if isinstance(error, UserError) else (str(error) or type(error).__name__,)
    _write(out, faults=[printable(fault) for fault in faults])


def _write(out: TextIO, **fields: Any) -> None:
    out.write(json.dumps(fields) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
