"""Lines of --prompt-file are chats as data has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.chats import said, write_rows
from qwen2_ascend.errors import UserError
from qwen2_ascend.inference.prompts import OutputFile, read_prompts
from qwen2_ascend.inference.settings import PromptSettings

BRIEF, LONG = said("system", "Be brief."), said("system", "Be long.")


def messages(folder: Path, row: dict[str, Any], **flags: Any) -> list[dict[str, Any]]:
    path = write_rows(folder / "p.jsonl", [row])
    (prompt,) = read_prompts(PromptSettings(prompt_file=path, **flags))
    return prompt.row["messages"]


def test_a_rows_own_system_prompt_is_that_of_its_chat(tmp_path: Path) -> None:
    asked = [said("user", "q")]
    row = {"messages": asked, "system": "Be brief."}
    assert messages(tmp_path, row) == [BRIEF, *asked]
    assert messages(tmp_path, row, system_prompt="Be long.") == [BRIEF, *asked]
    assert messages(tmp_path, {"messages": asked}, system_prompt="Be long.") == [LONG, *asked]
    assert messages(tmp_path, {**row, "system": ""}, system_prompt="Be long.") == [LONG, *asked]
    assert messages(tmp_path, {"messages": [BRIEF, *asked], "system": "Be brief."}) == [
        BRIEF,
        *asked,
    ]
    plain = {"prompt": "q", "system": "Be brief."}
    assert messages(tmp_path, plain, apply_chat_template=True) == [BRIEF, *asked]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [BRIEF, said("user", "q")], "system": "Be long."}, "two system prompts"),
        ({"messages": [said("user", "q")], "system": ["Be long."]}, '"system" is .*, not a text'),
        ({"prompt": "q", "system": "Be long."}, '"system" is .* say --apply-chat-template'),
    ],
)
def test_system_prompts_that_cannot_be_are_said(row, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"p.jsonl:1: .*{reason}"):
        messages(tmp_path, json.loads(json.dumps(row)))


@pytest.mark.parametrize("flag", ["system_prompt", "prompt_type"])
def test_what_no_row_of_a_file_would_get_is_refused(flag: str, tmp_path: Path) -> None:
    """A "prompt" is continued as it is; a chat beside it, or the template, takes the flag."""

    def read(*rows: dict[str, Any], **flags: Any) -> int:
        flags["prompt_file"] = write_rows(tmp_path / "p.jsonl", list(rows))
        if flag == "system_prompt":
            return len(read_prompts(PromptSettings(system_prompt="Be brief.", **flags)))
        return len(read_prompts(PromptSettings(**flags), "qwen"))

    plain = {"prompt": "q"}
    with pytest.raises(UserError, match=r"^--.* has none; say --apply-chat-template"):
        read(plain, plain)
    assert read(plain, plain, apply_chat_template=True) == 2
    assert read(plain, {"messages": [said("user", "q")]}) == 2


def test_columns_that_a_result_replaces_do_not_hinder_a_resume(tmp_path: Path) -> None:
    rows = [{"prompt": text, "response": "own", "finish_reason": "own"} for text in "ab"]
    path, out = write_rows(tmp_path / "p.jsonl", rows), tmp_path / "out.jsonl"
    settings = PromptSettings(prompt_file=path, output_file=out)
    stopped = OutputFile(settings, read_prompts(settings))
    weights = {"stored_as": "hf", "values": "1"}
    stopped.require_made_by({"weights": weights, "stop": ["x", 2]})
    stopped.open()
    stopped.add(0, {"response": "new", "finish_reason": "eos"})
    assert stopped._file is not None
    stopped._file.close()  # killed
    settings = PromptSettings(prompt_file=path, output_file=out, resume=True)
    again = OutputFile(settings, read_prompts(settings))
    assert again.num_done == 1 and not again.is_complete
    again.require_made_by({"weights": weights, "stop": ["x", 2]})
    again.require_made_by({"weights": {"stored_as": "shards", "values": "2"}, "stop": ["x", 2]})
    change = r"weights of other values; stop \['x', 2\] \(now \[\]\)"
    with pytest.raises(UserError, match=rf"begun otherwise.*: {change}\. Say what"):
        again.require_made_by({"weights": {**weights, "values": "2"}, "stop": []})
