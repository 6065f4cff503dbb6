"""What the folder of --save-hf says of chats, besides its weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data.chats import save_chat_tokenizer
from logs import logged_lines
from qwen2_ascend.data.chat.settings import ChatSettings
from qwen2_ascend.finetuning.taught import taught_files
from qwen2_ascend.prompt_types import prompt_template


@pytest.mark.parametrize("name", ["qwen", "chatml", None])
def test_model_chats_by_the_prompt_type_it_was_tuned_with(name: Any, tmp_path: Path) -> None:
    """Its template goes into the folder, and generation ends where its answers end."""
    tokenizer = save_chat_tokenizer(tmp_path / "hf", "{{ messages[0].content }}")
    (tokenizer / "generation_config.json").write_text('{"eos_token_id": 0}')
    plan: Any = SimpleNamespace(
        settings=SimpleNamespace(
            chat=ChatSettings(prompt_type=name),
            tuning=SimpleNamespace(tokenizer_name_or_path=str(tokenizer)),
        ),
        source=SimpleNamespace(side_files=(tokenizer / "generation_config.json",)),
    )
    with logged_lines() as said:
        files = taught_files(plan)
    if name is None:
        assert not files and not said
        return
    assert files["chat_template.jinja"].decode() == prompt_template(name)
    assert json.loads(files["generation_config.json"])["eos_token_id"] == [2, 0]
    assert "answers end with token 2" in said[0]
