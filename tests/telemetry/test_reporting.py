"""What only reports cannot end a run."""

from __future__ import annotations

import pytest

from qwen2_ascend.telemetry import reporting


@pytest.fixture(autouse=True)
def nothing_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "_failed", set())


def test_what_succeeds_gives_what_it_gives(capsys: pytest.CaptureFixture[str]) -> None:
    assert reporting.attempt("sum", lambda a, b: a + b, 1, b=2) == 3
    assert capsys.readouterr().err == ""


def test_each_failure_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device", "metrics.jsonl")

    for _ in range(3):
        assert reporting.attempt("metrics", full) is None
    reporting.attempt("picture", lambda: 1 / 0)
    assert capsys.readouterr().err.splitlines() == [
        "warning: metrics: [Errno 28] No space left on device: 'metrics.jsonl'; the run goes on.",
        "warning: picture: division by zero; the run goes on.",
    ]


def test_being_told_to_stop_is_no_failure() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reporting.attempt("metrics", interrupted)
