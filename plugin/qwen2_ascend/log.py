"""The log of a command: rank 0 writes each line at once, to stdout or to stderr.

Modules log with `logging.getLogger(__name__)`. Only the commands show what is logged, with
`shown_log`. A script that imports the package configures logging as it wants.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from qwen2_ascend.errors import printable
from qwen2_ascend.machine import rank
from qwen2_ascend.telemetry.reporting import attempt

PACKAGE = "qwen2_ascend"
Stream = Literal["stdout", "stderr"]


@contextmanager
def shown_log(stream: Stream, *, goes_on: bool = False) -> Iterator[None]:
    """Shows what the package logs, on rank 0; other libraries' loggers stay as they are.

    Args:
        stream: where the lines go.
        goes_on: whether the run goes on where a line cannot be written; else the error is raised.
    """
    logger, handler = logging.getLogger(PACKAGE), _Console(stream, goes_on)
    level, propagates = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a library may have configured the root logger
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagates


def log_above(bar: Any) -> None:
    """Has the lines written above a progress bar of tqdm's from now on; None ends it."""
    for handler in logging.getLogger(PACKAGE).handlers:
        if isinstance(handler, _Console):
            handler.bar = bar


class _Console(logging.Handler):
    """Asks for the stream at each line: tests and forked ranks replace it."""

    def __init__(self, stream: Stream, goes_on: bool) -> None:
        super().__init__()
        self.bar: Any = None
        self._stream, self._goes_on = stream, goes_on
        self.addFilter(lambda record: rank() == 0)

    def emit(self, record: logging.LogRecord) -> None:
        line = printable(record.getMessage())
        if self._goes_on:
            attempt("the log", self._write, line)
        else:
            self._write(line)

    def _write(self, line: str) -> None:
        file = getattr(sys, self._stream)
        if self.bar is not None:
            self.bar.write(line, file=file)
        else:
            print(line, file=file, flush=True)
