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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TextIO

import qwen2_ascend.runtime  # noqa: F401 - it comes before torch
from qwen2_ascend.errors import UserError, printable
from qwen2_ascend.log import shown_log

if TYPE_CHECKING:
    from qwen2_ascend.board.answering import Answerer


@shown_log("stderr")
def main() -> None:
    """Answers until the standard input ends."""
    # what libraries print goes to stderr; the answers have the standard output to themselves
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    questions: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
    write = partial(_write, out)
    try:
        from qwen2_ascend.board.answering import Answerer  # what it prints is for people

        answerer = Answerer(Path(sys.argv[1]), write)
    except Exception as error:
        _write_faults(write, error)
        return
    threading.Thread(target=_listen, args=(questions, answerer), daemon=True).start()
    write(ready=answerer.description)
    while (question := questions.get()) is not None:
        try:
            answerer.answer(question)
        except Exception as error:
            _write_faults(write, error)


def _listen(questions: SimpleQueue[dict[str, Any] | None], answerer: Answerer) -> None:
    for line in sys.stdin:
        message = json.loads(line)
        if message.get("stop"):
            answerer.stop()
        else:
            questions.put(message)
    answerer.stop()
    questions.put(None)


def _write_faults(write: Callable[..., None], error: Exception) -> None:
    faults = error.faults if isinstance(error, UserError) else (str(error) or type(error).__name__,)
    write(faults=[printable(fault) for fault in faults])


def _write(out: TextIO, **fields: Any) -> None:
    out.write(json.dumps(fields) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
