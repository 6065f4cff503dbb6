"""Tables that Markdown renders: a row that does not fit its head is a mistake of the caller."""

from __future__ import annotations

import pytest

from qwen2_ascend import markdown


def test_a_table_has_its_head_a_rule_and_a_line_for_each_row() -> None:
    lines = markdown.table(("side", "s"), [["ours", "1"], ["theirs", ""]]).splitlines()
    assert lines == ["| side | s |", "|---|---|", "| ours | 1 |", "| theirs |  |"]


def test_a_row_of_another_width_is_no_table() -> None:
    with pytest.raises(AssertionError):
        markdown.table(("side", "s"), [["ours"]])
