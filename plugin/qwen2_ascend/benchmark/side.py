"""The process of a side, run by `python -m`: loads what it needs, then answers line after line."""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module

import qwen2_ascend.runtime  # noqa: F401 - it comes before torch
from qwen2_ascend.errors import UserError


def main(module: str, *arguments: str) -> None:
    """Answers every line of the standard input, until it ends.

    Args:
        module: a module of this package. Its `prepare` loads what is needed and returns what
            answers a question.
        arguments: those of `prepare`.

    Raises:
        SystemExit: with 2 where it cannot be prepared, which has been printed.
    """
    # what libraries print is for people; the answers are alone on their pipe
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        answer = import_module(f"qwen2_ascend.benchmark.{module}").prepare(*arguments)
    except UserError as error:
        print("\n".join(f"error: {fault}" for fault in error.faults), file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    print(json.dumps("ready"), file=out, flush=True)
    for line in sys.stdin:
        said = json.dumps(answer(json.loads(line)))
        try:
            print(said, file=out, flush=True)
        except BrokenPipeError:
            os._exit(1)  # nobody asks any more


if __name__ == "__main__":
    main(*sys.argv[1:])
