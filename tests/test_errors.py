"""What other people's files are called and hold cannot take over the terminal."""

import pickle

import pytest

from qwen2_ascend.cli import run_command
from qwen2_ascend.errors import Lines, UserError, printable, shown

EVIL = "a\x1b[2J\nerror: all fine"
HOSTILE = {
    "terminal and newline": (EVIL, r"a\x1b[2J\nerror: all fine"),
    "carriage return": ("done\r    ", r"done\r    "),
    "backspaces": ("ab\x08\x08", r"ab\x08\x08"),
    "a C1 control": ("\x9b2J", r"\x9b2J"),
    "right to left": ("exe.\u202efdp", r"exe.\u202efdp"),
    "isolate": ("\u2066x\u2069", r"\u2066x\u2069"),
    "zero width": ("a\u200bb", r"a\u200bb"),
    "line separators": ("a\u2028b\u2029c\x85d\x0be", r"a\u2028b\u2029c\x85d\x0be"),
    "half a character": ("\udcff", r"\udcff"),
    "beyond 16 bits": ("\U000e0041", r"\U000e0041"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_faults_are_one_printable_line_each(case):
    text, escaped = HOSTILE[case]
    error = UserError([f"{text}: is damaged.", "another"])
    assert error.faults == (f"{escaped}: is damaged.", "another")
    assert str(error) == f"{escaped}: is damaged.\nanother"
    assert UserError(error.faults).faults == error.faults


def test_what_people_write_stays_as_it_is():
    for text in ("模型/千问.safetensors: é ß 😀", "C:\\new\\table", "100% {x}"):
        assert UserError(text).faults == (text,)


def test_our_own_lines_stay_lines_also_over_a_pipe():
    error = UserError([Lines("a table:\n  1  2"), "b\nc"])
    again = pickle.loads(pickle.dumps(error))
    assert again.faults == error.faults == ("a table:\n  1  2", r"b\nc")
    assert str(again) == str(error)


def test_other_errors_are_escaped_too(capsys):
    def fail():
        raise OSError(2, "No such file", "x\x1b]0;title\x07y")

    assert run_command(fail) == 1
    err = capsys.readouterr().err
    assert err.rstrip("\n").isprintable()


def test_a_long_name_is_cut():
    fault = UserError("x" * 10**6).faults[0]
    assert len(fault) < 11_000 and fault.endswith("... (1000000 characters)")


def test_of_very_many_faults_the_first_are_said():
    error = UserError(f"{i}." for i in range(100_000))
    assert len(error.faults) == 1001 and error.faults[-1] == "and 99000 more faults."


def test_values_are_shown_in_part():
    """However deep, wide or shared they are: repr of this list would have 10^9 elements."""
    laughs: list = []
    for _ in range(9):
        laughs = [laughs] * 10
    cyclic: list = []
    cyclic.append(cyclic)
    for value in (laughs, cyclic, "x" * 10**6, {str(i): i for i in range(10**5)}, 10**4000):
        assert len(shown(value)) < 500
    assert shown((1, "a\n")) == r"(1, 'a\n')"
    assert printable(shown("\x1b")) == r"'\x1b'"
