"""The tables of docs/migration.md: what becomes of every flag of MindSpeed-LLM's published lines.

They are made from the tables that the commands themselves go by:

    PYTHONPATH=plugin:tests python -m pasted.migration_page     writes them into both pages
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pasted.command_lines import command_lines
from qwen2_ascend.migration.programs import Program, find_program, own_flags

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
THEIRS = {
    "pretrain": "pretrain_gpt.py",
    "finetune": "posttrain_gpt.py",
    "convert": "convert_ckpt.py",
    "preprocess": "preprocess_data.py",
    "generate": "inference.py",
    "evaluate": "evaluation.py",
}
ELSEWHERE = {
    ("convert", "--save-dir"): "a merge goes into `mg2hf/` in it, as with convert_ckpt.py; the "
    "original model's files are never written",
    ("convert", "--load-dir"): "looked at; `--load-model-type` may be left out",
    ("preprocess", "--handler-name"): "it says `--task` too",
    ("preprocess", "--seq-length"): "a longer chat is cut at its end, not left out or cut in both "
    "its parts",
    ("preprocess", "--pack"): "the same attention; which chats share a pack differs",
    ("preprocess", "--neat-pack"): "the same attention; which chats share a pack differs",
    **{
        (kind, "--coc-fused-kernel"): "its library of kernels is not used; `--coc-parallel-num` "
        "cuts the products, or `--use-ascend-mc2` takes torch_npu's fused operators"
        for kind in ("pretrain", "finetune")
    },
    ("finetune", "--neat-pack"): "files of chats and data that was prepared without it are packed "
    "at start",
}
"""What is a flag of ours and still does something else than there, or something more."""
_FILE = json.loads((HERE / "migration_words.json").read_text(encoding="utf-8"))
WORDS: dict[str, dict[str, Any]] = _FILE["words"]
"""What the tables are made of, by language."""
REASONS: dict[str, str] = _FILE["reasons_zh"]
"""Reasons in Chinese."""
PAGES = {"en": ROOT / "docs/migration.md", "zh": ROOT / "docs/migration.zh-CN.md"}


class Row(NamedTuple):
    """One flag."""

    flag: str
    verdict: str
    """A key of WORDS."""
    why: str


def flags_of(kind: str) -> list[str]:
    """Every flag of the lines of one kind but those of models with experts, in their order."""
    words = (word for line in command_lines(kind) if not line.is_moe for word in line.flags)
    return list(dict.fromkeys(word for word in words if word.startswith("--")))


def rows(kind: str, language: str) -> Iterator[Row]:
    """What becomes of each flag.

    Raises:
        LookupError: of a flag that is neither ours nor in the command's table.
    """
    program = find_program(THEIRS[kind], [])
    assert program is not None
    known = own_flags(program.kind)
    for flag in sorted(flags_of(kind)):
        if flag in program.table:
            yield _pasted(flag, program, language)
        elif (kind, flag) in ELSEWHERE:
            yield Row(flag, "otherwise", _told(ELSEWHERE[kind, flag], language))
        elif flag in known or f"--{flag.removeprefix('--no-')}" in known:
            yield Row(flag, "same", "")
        else:
            raise LookupError(f"{kind}: {flag} is neither a flag of ours nor in the table")


def _pasted(flag: str, program: Program, language: str) -> Row:
    meaning, words = program.table[flag], WORDS[language]
    why = _told(meaning.says, language)
    if meaning.refused:
        return Row(flag, "refused", why)
    if meaning.becomes:
        return Row(flag, "otherwise", words["becomes"].format(" ".join(meaning.becomes)))
    if meaning.values:
        values = words["and"].join(f"`{value}`" for value in meaning.values)
        why = words["only"].format(values) + why
    is_checked = meaning.check is not None or bool(meaning.values)
    return Row(flag, "checked" if is_checked else "unneeded", why)


def _told(says: str, language: str) -> str:
    """A reason; in Chinese where it is translated."""
    if language == "en":
        return says
    return REASONS.get(says, says)


def table(kind: str, language: str) -> str:
    """The Markdown of one kind's table."""
    words = WORDS[language]
    lines = [
        f"| {' | '.join(words['head'])} |",
        "| --- | --- | --- |",
        *(
            f"| `{row.flag}` | {words[row.verdict]} | {row.why.replace('|', chr(92) + '|')} |"
            for row in rows(kind, language)
        ),
    ]
    return "\n".join(lines)


def with_tables(page: str, language: str) -> str:
    """A page with the text between its marks made anew."""
    for kind in THEIRS:
        begin, end = f"<!-- {kind}: begin -->", f"<!-- {kind}: end -->"
        pattern = re.compile(rf"(?s){re.escape(begin)}.*?{re.escape(end)}")
        made = f"{begin}\n{table(kind, language)}\n{end}"
        page, count = pattern.subn(lambda _, made=made: made, page)
        assert count == 1, f"the page has {count} places for {kind}"
    return page


def main() -> None:
    """Writes both pages."""
    for language, path in PAGES.items():
        path.write_text(with_tables(path.read_text(encoding="utf-8"), language), encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
