"""What a command shows of the log, and that it touches nobody else's."""

from __future__ import annotations

import io
import logging
import sys
from typing import Any

import pytest

from commands import run_python
from qwen2_ascend.log import log_above, shown_log

logger = logging.getLogger("qwen2_ascend.some.module")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_line_is_written_at_once_to_the_stream_of_the_moment(
    stream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with shown_log(stream):
        for _ in range(2):  # captured anew, as in a forked rank
            file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=False)
            monkeypatch.setattr(sys, stream, file)
            logger.info("100% of {it}")
            assert file.buffer.getvalue() == b"100% of {it}\n"  # type: ignore[attr-defined]
    logger.info("not shown")
    assert file.buffer.getvalue() == b"100% of {it}\n"  # type: ignore[attr-defined]


def test_rank_0_alone_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with shown_log("stdout"):
        monkeypatch.setenv("RANK", "1")
        logger.warning("hidden")
        monkeypatch.setenv("RANK", "0")
        logger.info("seen")
    assert capsys.readouterr() == ("seen\n", "")


def test_a_name_from_a_file_cannot_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    with shown_log("stderr"):
        logger.info("written: a\x1b[2Jb\nerror: c")
    assert capsys.readouterr().err == "written: a\\x1b[2Jb\\nerror: c\n"


def test_other_loggers_stay_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    package, root = logging.getLogger("qwen2_ascend"), logging.getLogger()
    before = (package.level, package.propagate, list(package.handlers))
    of_root = (root.level, list(root.handlers))
    with shown_log("stdout"):
        logging.getLogger("megatron").info("theirs")
        assert (root.level, list(root.handlers)) == of_root
    assert (package.level, package.propagate, list(package.handlers)) == before
    assert capsys.readouterr().out == ""


def test_a_line_is_shown_once_where_a_library_configures_the_root_logger(
    capsys: pytest.CaptureFixture[str],
) -> None:
    theirs = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(theirs)
    try:
        with shown_log("stdout"):
            logger.warning("once")
    finally:
        logging.getLogger().removeHandler(theirs)
    assert capsys.readouterr() == ("once\n", "")


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError("no reader")


def test_a_line_that_cannot_be_written_ends_the_command_but_no_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qwen2_ascend.telemetry.reporting._failed", set())
    monkeypatch.setattr(sys, "stdout", Broken())
    with shown_log("stdout"), pytest.raises(BrokenPipeError):
        logger.info("lost")
    with shown_log("stdout", goes_on=True):
        logger.info("lost")
        logger.info("lost")
    assert capsys.readouterr().err == "warning: the log: no reader; the run goes on.\n"


def test_lines_go_above_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    class Bar:
        def write(self, line: str, file: Any) -> None:
            print(f"[{line}]", file=file)

    with shown_log("stdout"):
        log_above(Bar())
        logger.info("above")
        log_above(None)
        logger.info("after")
    assert capsys.readouterr().out == "[above]\nafter\n"


def test_a_script_that_imports_the_package_has_its_logging_to_itself() -> None:
    """Python's own default: a warning goes to stderr as it is, a line of the log nowhere."""
    script = (
        "import logging, qwen2_ascend.launching, qwen2_ascend.training.launch\n"
        "assert not logging.getLogger().handlers\n"
        "assert not logging.getLogger('qwen2_ascend').handlers\n"
        "logging.getLogger('qwen2_ascend.checkpoint.load').info('a line')\n"
        "logging.getLogger('qwen2_ascend.checkpoint.load').warning('a warning')\n"
    )
    ended = run_python("-c", script)
    assert (ended.out, ended.err) == ("", "a warning\n")
