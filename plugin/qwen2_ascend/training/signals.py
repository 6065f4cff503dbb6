"""Being told to stop: SIGTERM sets a flag, which all ranks look at together after each step."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

from qwen2_ascend.runtime import ending

SAME_SECONDS = 10.0
"""A scheduler that signals all processes of a job signals ranks and torchrun, and torchrun signals
its ranks again: what comes so soon after the first SIGTERM is no second wish."""


class StopSignal:
    """While it is entered, SIGTERM is remembered rather than obeyed; a second one is obeyed.

    A scheduler may signal one rank, or all at different moments: `received` is this rank's own
    view, and the training loop stops when any rank's is true.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.received = False
        self._before: Any = signal.SIG_DFL
        self._first = 0.0

    def __enter__(self) -> StopSignal:
        if self.enabled:
            self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            signal.signal(signal.SIGTERM, self._before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received and now - self._first > SAME_SECONDS:
            signal.signal(signal.SIGTERM, self._before)
            signal.raise_signal(signal.SIGTERM)
        elif not self.received:
            self.received, ending.stop_received, self._first = True, True, now
