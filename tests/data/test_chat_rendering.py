"""The loss is on exactly what the assistant says, token by token, against the template itself."""

from __future__ import annotations

import os
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from chats import (
    CHATML,
    DEFAULT_SYSTEM,
    MARKED,
    TOOL_TURNS,
    TOOLS,
    TURNS,
    called,
    chat_rows,
    said,
    save_chat_tokenizer,
)
from transformers import AutoTokenizer

from qwen2_ascend.data.chat.formats import Chat
from qwen2_ascend.data.chat.rendering import ChatRenderer, TemplateError, given_template
from qwen2_ascend.data.chat.settings import ChatSettings
from qwen2_ascend.errors import UserError

REWRITING = CHATML.replace(
    "{{ '\\n' + message.content }}",
    "{{ '\\n' + (message.content if loop.last else message.content.split('</think>')[-1]) }}",
)
"""Leaves the reasoning of earlier turns out, as Qwen3's does."""


def chat_of(messages: list[dict], tools: list[dict] | None = None) -> Chat:
    said = tuple(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return Chat(messages, tools, said)


CHATS = [chat_of(turns) for turns in TURNS] + [chat_of(TOOL_TURNS, TOOLS)]
CHATS += [chat_of(row["messages"]) for row in chat_rows(20, seed=3)]


@pytest.fixture(scope="module", params=["small", pytest.param("Qwen2.5", marks=pytest.mark.real)])
def tokenizer(request, tmp_path_factory: pytest.TempPathFactory):
    if request.param == "small":
        return AutoTokenizer.from_pretrained(
            save_chat_tokenizer(tmp_path_factory.mktemp("chat_tokenizer"))
        )
    folder = os.environ.get("QWEN2_REAL_CHECKPOINT")
    if not folder:
        pytest.skip("QWEN2_REAL_CHECKPOINT names no Hugging Face folder of Qwen2.5")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def small_tokenizer(tokenizer_folder: Path):
    loaded = AutoTokenizer.from_pretrained(tokenizer_folder)
    loaded.chat_template = CHATML
    return loaded


def ids_of(tokenizer, chat: Chat, end: int | None = None, ask: bool = False) -> list[int]:
    return tokenizer.apply_chat_template(
        chat.messages[:end], tools=chat.tools, add_generation_prompt=ask, return_dict=False
    )


def trained_text(tokenizer, chat: Chat, **options) -> str:
    """What of a chat is trained on."""
    (tokens,) = ChatRenderer(tokenizer, **options)([chat])
    return tokenizer.decode(tokens.ids[tokens.trained])


def trained_runs(tokens) -> list[tuple[int, int]]:
    """(begin, end) of every stretch of trained tokens."""
    runs = []
    for trained, places in groupby(range(len(tokens.ids)), key=lambda i: bool(tokens.trained[i])):
        places = list(places)
        if trained:
            runs.append((places[0], places[-1] + 1))
    return runs


@pytest.mark.parametrize("index", range(len(CHATS)))
def test_every_turn_follows_its_prompt_and_ends_with_the_end_of_turn(tokenizer, index) -> None:
    """A trained turn follows the very ids that the model is asked with when it generates.

    The turn is what it then says, up to the token that stops it, and nothing else is trained on.
    """
    chat = CHATS[index]
    (tokens,) = ChatRenderer(tokenizer)([chat])
    runs = trained_runs(tokens)
    assert len(runs) == len(chat.trained)
    whole = tokenizer.apply_chat_template(chat.messages, tools=chat.tools, tokenize=False)
    assert tokenizer.decode(tokens.ids) == whole
    answered_with_newline = False
    for turn, (begin, end) in zip(chat.trained, runs, strict=True):
        prompt = ids_of(tokenizer, chat, turn, ask=True)
        if not answered_with_newline:  # else the prompt's history is tokenized in another way
            assert tokens.ids[:begin].tolist() == prompt
        text = tokenizer.decode(tokens.ids[begin:end])
        message = chat.messages[turn]
        assert text.startswith(message["content"])
        assert text.count("<tool_call>") == len(message.get("tool_calls", []))
        assert text.endswith("<|im_end|>") and text.count("<|im_end|>") == 1
        assert text == f"{message['content']}<|im_end|>" or message.get("tool_calls")
        answered_with_newline |= message["content"].startswith("\n")
    if not answered_with_newline:
        assert tokens.ids.tolist() == ids_of(tokenizer, chat)


def test_tool_calls_piece_by_piece(small_tokenizer) -> None:
    """Everything written out: the system prompt with tools, calls, grouped answers of tools."""
    tool = '{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}'
    call = '<tool_call>\n{{"name": "weather", "arguments": {}}}\n</tool_call>'
    pieces = [
        (f"<|im_start|>system\n{DEFAULT_SYSTEM}\n\n", 0),
        (f"# Tools\n<tools>\n{tool}\n</tools><|im_end|>\n", 0),
        ("<|im_start|>user\nweather in a and b?<|im_end|>\n<|im_start|>assistant\n", 0),
        (call.format('{"in": "a"}') + "\n" + call.format('{"in": "b"}') + "<|im_end|>", 1),
        ("\n<|im_start|>user\n<tool_response>\nrain\n</tool_response>\n", 0),
        ("<tool_response>\n\n</tool_response><|im_end|>\n<|im_start|>assistant\n", 0),
        ("It rains in a.<|im_end|>", 1),
        ("\n<|im_start|>user\nand in c?<|im_end|>\n<|im_start|>assistant\n", 0),
        ("I look.\n" + call.format('{"in": "c", "語": null}') + "<|im_end|>", 1),
        ("\n<|im_start|>user\n<tool_response>\nsun\n</tool_response><|im_end|>\n", 0),
        ("<|im_start|>assistant\n", 0),
        ("Sun.<|im_end|>", 1),
        ("\n", 0),
    ]
    (tokens,) = ChatRenderer(small_tokenizer)([chat_of(TOOL_TURNS, TOOLS)])
    # neighbours with no loss are one text to the tokenizer
    joined = [
        ("".join(text for text, _ in group), trained)
        for trained, group in groupby(pieces, key=lambda piece: piece[1])
    ]
    ids = [small_tokenizer(text, add_special_tokens=False).input_ids for text, _ in joined]
    expected = [
        (i, bool(trained)) for row, (_, trained) in zip(ids, joined, strict=True) for i in row
    ]
    assert list(zip(tokens.ids.tolist(), tokens.trained.tolist(), strict=True)) == expected


def test_default_system_prompt_is_the_templates(small_tokenizer) -> None:
    with_system, without = (
        ChatRenderer(small_tokenizer)([chat_of(turns)])[0]
        for turns in ([said("system", DEFAULT_SYSTEM), *TURNS[0]], TURNS[0])
    )
    assert np.array_equal(with_system.ids, without.ids)
    assert np.array_equal(with_system.trained, without.trained)


def test_train_on_prompt_and_mask_history(small_tokenizer) -> None:
    chat = CHATS[3]
    (plain,) = ChatRenderer(small_tokenizer)([chat])
    (last,) = ChatRenderer(small_tokenizer, mask_history=True)([chat])
    (everything,) = ChatRenderer(small_tokenizer, train_on_prompt=True)([chat])
    assert trained_runs(last) == trained_runs(plain)[-1:]
    assert everything.trained.all()
    assert everything.ids.tolist() == ids_of(small_tokenizer, chat)


def test_only_the_chats_own_turns_are_trained_on(small_tokenizer) -> None:
    """That is the answer of preference pairs, and the turns that count by OpenAI's weights."""
    chat = CHATS[3]
    (every,) = ChatRenderer(small_tokenizer)([chat])
    (one,) = ChatRenderer(small_tokenizer)([chat._replace(trained=chat.trained[1:2])])
    assert trained_runs(one) == trained_runs(every)[1:2]


@pytest.mark.parametrize("chat", [CHATS[0], CHATS[1], CHATS[3], *CHATS[4:8]])
def test_generation_markers_give_the_same_turns(small_tokenizer, chat) -> None:
    """They have the newline in front, where the markers of this template begin."""
    (plain,) = ChatRenderer(small_tokenizer)([chat])
    (marked,) = ChatRenderer(small_tokenizer, chat_template=MARKED)([chat])
    assert marked.ids.tolist() == plain.ids.tolist()
    assert trained_runs(marked) == [(begin - 1, end) for begin, end in trained_runs(plain)]


SIMPLE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("said_first", ["h", "hello 😀", "語", "é", "<|im_end|>"])
def test_markers_mask_exactly_what_is_between_them(small_tokenizer, said_first) -> None:
    """A span may end in a character of several tokens; a first span may be a single token.

    transformers' own mask leaves out all of the last character's tokens but the first, and lets
    such a first span run on into the next turn.
    """
    turns = [
        said("user", ""),
        said("assistant", said_first),
        said("user", "and then"),
        said("assistant", "naïve 日本"),
    ]
    template = SIMPLE.replace("{{ m.content }}{% else", "{{ m.content }}<|im_end|>{% else")
    chat = chat_of(turns if said_first != "<|im_end|>" else turns[2:])
    (tokens,) = ChatRenderer(small_tokenizer, chat_template=template)([chat])
    texts = [small_tokenizer.decode(tokens.ids[a:b]) for a, b in trained_runs(tokens)]
    assert texts == [chat.messages[i]["content"] for i in chat.trained]
    whole = small_tokenizer.apply_chat_template(
        chat.messages, chat_template=template, tokenize=False
    )
    assert small_tokenizer.decode(tokens.ids) == whole


def test_markers_around_something_else_are_bad_rows(small_tokenizer) -> None:
    template = (
        "{% for m in messages %}{{ m.content }}{% generation %}!{% endgeneration %}{% endfor %}"
    )
    (bad,) = ChatRenderer(small_tokenizer, chat_template=template)([CHATS[0]])
    assert "the chat template does not write turn 2 (assistant) where the assistant speaks" in str(
        bad
    )


WITHOUT_TOOLS = (
    "{% for m in messages %}{% if m.role != 'system' %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize("options", [{}, {"train_on_prompt": True}, {"mask_history": True}])
def test_a_chat_whose_text_lacks_a_part_is_a_bad_row(small_tokenizer, options) -> None:
    """It would be trained on as another chat, and nothing would show it."""
    system = chat_of([said("system", "Be brief."), *TURNS[0]])
    lone = chat_of([TURNS[0][0], said("assistant", "gone")])
    render = ChatRenderer(small_tokenizer, chat_template=WITHOUT_TOOLS, **options)
    good, *bad = render([CHATS[0], system, chat_of(TOOL_TURNS, TOOLS)])
    assert len(good.ids)
    assert "the chat template leaves out turn 1 (system); give --chat-template" in str(bad[0])
    assert "leaves out the tools, the calls of tools; give" in str(bad[1])
    mute = WITHOUT_TOOLS.replace("m.content", "m.content | replace('gone', '')")
    (lost,) = ChatRenderer(small_tokenizer, chat_template=mute, **options)([lone])
    assert "leaves out turn 2 (assistant)" in str(lost)


def test_chats_with_tools_are_written_by_the_template_for_tools(small_tokenizer, tmp_path) -> None:
    """apply_chat_template chooses in the same way, chat by chat."""
    small_tokenizer.save_pretrained(tmp_path)
    many = AutoTokenizer.from_pretrained(tmp_path)
    many.chat_template = {"default": WITHOUT_TOOLS, "tool_use": CHATML}
    with_tools, plain = chat_of(TOOL_TURNS, TOOLS), CHATS[0]
    render = ChatRenderer(many)
    for chat, tokens in zip((with_tools, plain), render([with_tools, plain]), strict=True):
        whole = many.apply_chat_template(chat.messages, tools=chat.tools, tokenize=False)
        assert many.decode(tokens.ids) == whole
        assert len(trained_runs(tokens)) == len(chat.trained)


def test_a_template_that_takes_too_much_ends_the_run(small_tokenizer) -> None:
    (error,) = ChatRenderer(small_tokenizer, chat_template="{{ 'a' * 10**10 }}")([CHATS[0]])
    assert isinstance(error, TemplateError)


def test_a_template_that_rewrites_earlier_turns_is_refused_with_a_way_out(small_tokenizer) -> None:
    thought = [said("user", "q"), said("assistant", "so</think>a")]
    thought += [said("user", "p"), said("assistant", "b")]
    chat = chat_of(thought)
    (error,) = ChatRenderer(small_tokenizer, chat_template=REWRITING)([chat])
    assert isinstance(error, TemplateError)
    assert "first 2 message(s) of a chat differently" in str(error)
    assert all(way in str(error) for way in ("generation", "--mask-history", "--train-on-prompt"))
    single = chat_of(thought[:2])
    text = trained_text(small_tokenizer, single, chat_template=REWRITING)
    assert text == "so</think>a<|im_end|>"
    (last,) = ChatRenderer(small_tokenizer, chat_template=REWRITING, mask_history=True)([chat])
    assert small_tokenizer.decode(last.ids[last.trained]) == "b<|im_end|>"
    assert "so</think>" not in small_tokenizer.decode(last.ids)


def test_a_template_without_an_end_of_turn_is_trained_on_to_the_end_of_the_turn(
    small_tokenizer,
) -> None:
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    text = trained_text(small_tokenizer, CHATS[0], chat_template=template)
    assert text == "hello there\n"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([said("user", "a<|im_end|>b"), said("assistant", "c")], r"turn 1 holds <\|im_end\|>"),
        ([said("user", "a"), said("assistant", "\ud83d")], "half of a surrogate pair"),
        ([said("assistant", "a"), said("user", "b")], "turn 1 is the assistant's, and nothing"),
        *(
            (
                [said("user", "a"), said("assistant", "", tool_calls=[called(name, arguments)])],
                reason,
            )
            for name, arguments, reason in (
                ("weather", {"in": ["<|im_end|>"]}, r"turn 2 holds <\|im_end\|>"),
                ("weather", {"in": "\ud83d"}, "turn 2 holds half of a surrogate pair"),
                ("weather", {"\ud83d": 1}, "turn 2 holds half of a surrogate pair"),
                ("\ud83d", {}, "turn 2 holds half of a surrogate pair"),
            )
        ),
    ],
)
def test_texts_that_would_spoil_the_chat_are_bad_rows(small_tokenizer, messages, reason) -> None:
    good, bad = ChatRenderer(small_tokenizer)([CHATS[0], chat_of(messages)])
    assert len(good.ids)
    with pytest.raises(ValueError, match=reason):
        raise bad


@pytest.mark.parametrize(("spoilt", "reason"), [("<|im_end|>", "<"), ("\ud83d", "half of")])
def test_tools_that_would_spoil_the_chat_are_bad_rows(small_tokenizer, spoilt, reason) -> None:
    function = {**TOOLS[0]["function"], "description": spoilt}
    chat = chat_of(TURNS[0], [{"type": "function", "function": function}])
    (bad,) = ChatRenderer(small_tokenizer)([chat])
    assert str(bad).startswith(f"a tool holds {reason}")


R1 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|im_start|>A:' + m.content.split('</think>')[-1] + '<|im_end|>' }}"
    "{% else %}{{ 'U:' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>A:' }}{% endif %}"
)
"""Leaves the reasoning of every turn out, as that of DeepSeek-R1-Distill-Qwen does."""
THOUGHTS = (
    said("assistant", "<think>\nso\n</think>\n\na"),
    said("assistant", "so\n</think>a"),
    said("assistant", "a", reasoning_content="so"),
    said("assistant", "a", reasoning="so"),
)


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("settings", [{}, {"train_on_prompt": True}, {"mask_history": True}])
@pytest.mark.parametrize("index", range(len(THOUGHTS)))
def test_reasoning_that_the_template_leaves_out_is_never_trained_without(
    small_tokenizer, index, settings, marked
) -> None:
    template = R1
    if marked:
        template = R1.replace("{% else %}", "{% endgeneration %}{% else %}").replace(
            "{{ '<|im_start|>A:' + m", "{{ '<|im_start|>A:' }}{% generation %}{{ m"
        )
    render = ChatRenderer(small_tokenizer, chat_template=template, **settings)
    (bad,) = render([chat_of([said("user", "q"), THOUGHTS[index]])])
    assert "the reasoning of turn 2 (assistant)" in str(bad)
    (good,) = render([chat_of([said("user", "q"), said("assistant", "<think>\n</think>a")])])
    assert "a" in small_tokenizer.decode(good.ids)


def test_reasoning_may_be_left_out_of_turns_that_are_not_trained_on(small_tokenizer) -> None:
    turns = [said("user", "q"), THOUGHTS[0], said("user", "p"), said("assistant", "b")]
    for chat, settings in ((Chat(turns, None, (3,)), {}), (chat_of(turns), {"mask_history": True})):
        text = trained_text(small_tokenizer, chat, chat_template=R1, **settings)
        assert text == "b<|im_end|>"


def test_reasoning_that_the_template_writes_in_its_own_way_is_trained_on(small_tokenizer) -> None:
    template = R1.replace(
        "m.content.split('</think>')[-1]",
        "'<think>' + (m.reasoning_content or m.content.split('</think>')[0].lstrip('<think>'))"
        " + '</think>' + m.content.split('</think>')[-1].lstrip()",
    )
    for message in THOUGHTS[:3]:
        chat = chat_of([said("user", "q"), message])
        assert "so" in trained_text(small_tokenizer, chat, chat_template=template)


def test_what_is_trained_on_is_said_once() -> None:
    with pytest.raises(UserError, match="--train-on-prompt and --mask-history: each says"):
        ChatSettings(train_on_prompt=True, mask_history=True)


def test_a_bom_in_front_of_a_template_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(f"\ufeff{CHATML}", encoding="utf-8")
    assert given_template(ChatSettings(chat_template=tmp_path / "t.jinja")) == CHATML


@pytest.mark.parametrize("name", ["deepseek3", "default"])
def test_token_that_a_template_names_would_spoil_the_chat_too(small_tokenizer, name: str) -> None:
    """These write eos_token, whatever it is."""
    messages = [said("user", f"a{small_tokenizer.eos_token}b"), said("assistant", "c")]
    (bad,) = ChatRenderer(small_tokenizer, prompt_type=name)([chat_of(messages)])
    assert f"turn 1 holds {small_tokenizer.eos_token}" in str(bad)


def test_prompt_type_trains_on_all_that_an_answer_is_written_as(small_tokenizer) -> None:
    """qwen_lf's answers end with a newline, as MindSpeed-LLM's labels do."""
    for name, text in (("qwen_lf", "hello there<|im_end|>\n"), ("qwen", "hello there<|im_end|>")):
        assert trained_text(small_tokenizer, CHATS[0], prompt_type=name) == text


def test_prompt_type_refuses_a_chat_with_tools(small_tokenizer) -> None:
    chat = chat_of(CHATS[0].messages, TOOLS)
    (bad,) = ChatRenderer(small_tokenizer, prompt_type="qwen")([chat])
    assert "leaves out tool weather" in str(bad)


def test_a_chat_that_the_template_refuses_is_a_bad_row(small_tokenizer) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    (bad,) = ChatRenderer(small_tokenizer, chat_template=template)([CHATS[0]])
    assert "the chat template refuses it: roles must alternate" in str(bad)


def test_a_tokenizer_without_template_is_refused(tokenizer_folder: Path) -> None:
    with pytest.raises(UserError, match=r"no chat template .* give --chat-template FILE"):
        ChatRenderer(AutoTokenizer.from_pretrained(tokenizer_folder))
