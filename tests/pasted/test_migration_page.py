"""docs/migration.md says of every flag what the commands' own tables say."""

from __future__ import annotations

from typing import get_args

import pytest

from distributed.jobs import ROOT
from pasted.command_lines import command_lines
from pasted.migration_page import (
    ELSEWHERE,
    PAGES,
    REASONS,
    THEIRS,
    WORDS,
    flags_of,
    rows,
    with_tables,
)
from pasted.models import NOT_ITS_OWN
from pasted.test_generate import OTHER_BASE
from pasted.test_training import MODULES as TRAINED
from pasted.test_training import WHOLE
from qwen2_ascend.prompt_types import PROMPT_FORMATS, PromptType


@pytest.mark.parametrize("language", PAGES)
def test_tables_are_those_of_the_commands(language: str) -> None:
    page = PAGES[language].read_text(encoding="utf-8")
    assert page == with_tables(page, language), "run python -m pasted.migration_page"


@pytest.mark.parametrize("kind", THEIRS)
def test_every_flag_has_a_row_and_a_verdict(kind: str) -> None:
    found = {row.flag: row for row in rows(kind, "en")}
    assert set(found) == set(flags_of(kind))
    for row in found.values():
        assert row.verdict in WORDS["en"] and (row.why or row.verdict == "same")


def test_reasons_are_told_in_chinese_too() -> None:
    told = {row.why for kind in THEIRS for row in rows(kind, "en") if row.verdict != "otherwise"}
    whys = {why.split(": ", 1)[1] if why.startswith("only `") else why for why in told if why}
    assert sorted(whys - set(REASONS)) == []
    assert sorted(set(ELSEWHERE.values()) - set(REASONS)) == []


@pytest.mark.parametrize(
    ("page", "claims"),
    [
        (
            "README.md",
            (
                "Of {} of its published command lines",
                "dense Qwen2 models, {}\nstart",
                " and {} contradict",
            ),
        ),
        (
            "README.zh-CN.md",
            (
                "公开的 {} 条稠密 Qwen2 命令行中",
                "\n{} 条可原样启动",
                "{} 条与其模型的",
            ),
        ),
    ],
)
def test_the_figures_of_the_readme_are_those_of_the_lines(
    page: str, claims: tuple[str, ...]
) -> None:
    """test_training.py and its like hold that the others start."""
    lines = [line for kind in THEIRS for line in command_lines(kind) if not line.is_moe]
    whole = [line for line in lines if line.kind not in TRAINED or line in WHOLE]
    wrong = [
        line
        for line in whole
        if line.name == OTHER_BASE or line.name.rpartition("/")[2] in NOT_ITS_OWN
    ]
    counts = (len(whole), len(whole) - len(wrong), len(wrong))
    text = (ROOT / page).read_text(encoding="utf-8")
    for claim, count in zip(claims, counts, strict=True):
        assert claim.format(count) in text, counts


@pytest.mark.parametrize("language", PAGES)
def test_prompt_types_are_listed_with_their_system_texts(language: str) -> None:
    page = PAGES[language].read_text(encoding="utf-8")
    for name in get_args(PromptType):
        lines = [line for line in page.splitlines() if line.startswith("|") and f"`{name}`" in line]
        assert len(lines) == 1
        default = PROMPT_FORMATS[name].default_system
        assert name in ("alpaca", "chatml_de") or default in lines[0]
