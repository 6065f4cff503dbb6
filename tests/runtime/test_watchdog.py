"""The watchdog's parts that need no other rank; tests/distributed/test_failures.py has the rest."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time

import pytest

from qwen2_ascend.runtime import watchdog

STOPPED = """
    import os, signal
    from qwen2_ascend.runtime.watchdog import _KillTimer

    timer = _KillTimer()
    timer.wind_up(60)
    timer.wind_up({seconds})
    {then}
    os.kill(os.getpid(), signal.SIGSTOP)
"""


def stopped(seconds: float, then: str = "") -> subprocess.Popen:
    script = textwrap.dedent(STOPPED).format(seconds=seconds, then=then)
    return subprocess.Popen([sys.executable, "-c", script])


def test_the_kernel_kills_a_stopped_process_that_cannot_end_itself() -> None:
    process = stopped(0.2)
    try:
        assert process.wait(60) == -signal.SIGKILL
    finally:
        process.kill()


def test_a_timer_that_was_stopped_kills_nobody() -> None:
    process = stopped(0.2, "timer.stop()")
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("timeout", [1, 6, 30, 600, 36000])
def test_a_silent_rank_is_named_before_it_is_killed_and_within_ten_seconds(timeout: float) -> None:
    beat = watchdog.interval_seconds(timeout)
    # a beat that came just before a look, the look that is over the time-out, the closer look
    named = timeout + 2 * beat + 2.5 * beat
    assert named < watchdog.timer_seconds(timeout) < timeout + 10


def test_a_beat_is_read_as_it_was_written() -> None:
    beat = watchdog.Beat("3", "", "a host", "loop.py:3 in step")
    assert watchdog.Beat.decode(beat.encode().encode()) == beat


def test_a_store_that_does_not_answer_holds_nobody() -> None:
    begun = time.monotonic()
    watchdog._briefly(lambda: time.sleep(60))
    assert time.monotonic() - begun < 10
