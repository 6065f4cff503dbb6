"""SIGTERM while training: remembered once, however often a scheduler repeats it; then obeyed."""

from __future__ import annotations

import signal

import pytest

from qwen2_ascend.training import signals
from qwen2_ascend.training.signals import SAME_SECONDS, StopSignal


class Obeyed(Exception):
    """What an earlier handler raises."""


def obey(*_: object) -> None:
    raise Obeyed


def test_a_repeated_signal_is_the_same_wish_and_a_later_one_is_obeyed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(signals.ending, "stop_received", False)
    before = signal.signal(signal.SIGTERM, obey)
    try:
        with StopSignal() as stop:
            assert not stop.received
            for _ in range(3):  # the scheduler's, torchrun's, and once more
                signal.raise_signal(signal.SIGTERM)
                clock[0] += SAME_SECONDS / 4
            assert stop.received
            clock[0] += SAME_SECONDS
            with pytest.raises(Obeyed):
                signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
