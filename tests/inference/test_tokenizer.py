"""A chat is asked as chats are trained on, in whatever form its tools and their calls are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.chats import TOOLS, called, said, save_chat_tokenizer
from qwen2_ascend.data.chat.formats import row_format
from qwen2_ascend.data.chat.rendering import ChatRenderer
from qwen2_ascend.errors import UserError
from qwen2_ascend.inference.tokenizer import Tokenizer
from qwen2_ascend.pretrained import open_tokenizer

CALL = called("weather", {"in": "a", "語": 1})
AS_TEXT = called("weather", json.dumps({"in": "a", "語": 1}))  # type: ignore[arg-type]
FUNCTIONS = [tool["function"] for tool in TOOLS]


def asked(call: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    called_by = {"role": "assistant", "content": None, **(more or {"tool_calls": [call]})}
    return [said("user", "weather?"), called_by, said("tool", "rain")]


CHATS: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "plain": (asked(CALL), TOOLS),
    "arguments as OpenAI gives them": (asked(AS_TEXT), TOOLS),
    "a call as OpenAI gave it": (asked(CALL, function_call=AS_TEXT["function"]), TOOLS),
    "tools without their type": (asked(CALL), FUNCTIONS),
    "tools as text": (asked(CALL), json.dumps(TOOLS)),
    "parts": (
        [{"role": "user", "content": [{"type": "text", "text": "wea"}, {"text": "ther?"}]}],
        None,
    ),
    "a developer": ([said("developer", "Be brief."), said("user", "q")], None),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_is_asked_as_it_was_trained_on(name: str, folder: Path) -> None:
    messages, tools = CHATS[name]
    answer = said("assistant", "It rains.")
    row = {"messages": [*messages, answer], "tools": tools}
    (chat,) = row_format("openai", "sft", {}).chats(row)
    chat = chat._replace(trained=(len(messages),))
    (tokens,) = ChatRenderer(open_tokenizer(folder))([chat])
    begin = tokens.trained.argmax()
    assert Tokenizer(folder).encode_chat(messages, tools) == tokens.ids[:begin].tolist()


def test_a_call_is_written_once_not_as_a_text_in_a_text(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    text = tokenizer.decode(tokenizer.encode_chat(asked(AS_TEXT), TOOLS))
    assert '"arguments": {"in": "a", "語": 1}}' in text


@pytest.mark.parametrize(
    ("messages", "tools", "reason"),
    [
        ([said("user", "q"), said("assistant", "", tool_calls=["x"])], None, "has no function"),
        ([{"role": "user", "content": None}], None, r"turn 1 \(user\) says nothing"),
        ([{"role": "user", "content": [{"type": "image"}]}], None, "other than text"),
        ([said("user", "q")], "x", "'tools' is not JSON"),
    ],
)
def test_what_cannot_be_asked_is_said(messages, tools, reason: str, folder: Path) -> None:
    with pytest.raises(UserError, match=reason):
        Tokenizer(folder).encode_chat(messages, tools)


def test_a_role_that_only_the_template_knows_is_left_to_it(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role + ':' + m.content + ';' }}{% endfor %}"
    tokenizer = Tokenizer(save_chat_tokenizer(tmp_path / "t", template))
    messages = [said("critic", "no"), said("user", "q")]
    assert tokenizer.decode(tokenizer.encode_chat(messages)) == "critic:no;user:q;"
