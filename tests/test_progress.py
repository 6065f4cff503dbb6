"""Lines in a log now and then, a bar on a terminal, and the final figures in both."""

from __future__ import annotations

import io
import sys

from qwen2_ascend.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_few_lines_and_the_last_once(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress("write", 4_000_000_000, seconds_per_line=0.0) as progress:
        for _ in range(4):
            progress(1_000_000_000)
    lines = sys.stderr.getvalue().splitlines()
    assert [line.split(" of ")[0] for line in lines] == [
        "write:  25%",
        "write:  50%",
        "write:  75%",
        "write: 100%",
    ]
    assert lines[-1].endswith("GB/s") and "of 4.00 GB" in lines[-1]


def test_a_short_run_gets_one_line(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress("verify", 100) as progress:
        progress(100)
    assert len(sys.stderr.getvalue().splitlines()) == 1


def test_a_terminal_gets_a_bar_that_goes_away(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("write", 1000) as progress:
        progress(1000)
    said = sys.stderr.getvalue()
    assert "\r" in said and said.splitlines()[-1].startswith("write: 100%")


def test_a_failed_run_does_not_say_100_percent(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    try:
        with Progress("write", 1000) as progress:
            progress(10)
            raise OSError
    except OSError:
        pass
    assert sys.stderr.getvalue() == ""
