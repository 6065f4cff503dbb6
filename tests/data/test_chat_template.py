"""Chat templates: chosen and written as transformers does, but never without end.

A template comes with a model's folder, so it may be anybody's.
"""

from __future__ import annotations

import contextlib
import json
import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from chats import CHATML, MARKED, TOOL_TURNS, TOOLS, TURNS, chat_rows, save_chat_tokenizer

from qwen2_ascend import chat_template
from qwen2_ascend.chat_template import (
    ChatError,
    LimitError,
    lost_tools,
    lost_turns,
    render,
    render_marked,
    template_for,
)
from qwen2_ascend.errors import UserError
from qwen2_ascend.pretrained import open_tokenizer

CHAT = TURNS[0]
FOREVER = "{% for i in range(99999) %}{% for j in range(99999) %}"
ENDLESS = {
    "a string times a number": "{{ 'a' * 10**10 }}",
    "a text times a number": "{{ messages[0].content * 10**10 }}",
    "loops in loops": FOREVER + "{% endfor %}{% endfor %}",
    "loops that write": FOREVER + "aaaaaaaa{% endfor %}{% endfor %}",
    "format": "{{ '{:10000000000}'.format(1) }}",
    "percent": "{{ '%1000000000s' % '' }}",
    "the filter format": "{{ '%1000000000s' | format('') }}",
    "center": "{{ 'a' | center(10**10) }}",
    "indent": "{{ 'a\\nb' | indent(10**10) }}",
    "zfill": "{{ 'a'.zfill(10**10) }}",
    "expandtabs": "{{ ('\\t' * 1000).expandtabs(10**9) }}",
    "tojson": "{{ messages | tojson(indent=10**9) }}",
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "doubling": (
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
        "{% endfor %}{{ n.x | length }}"
    ),
    "squaring": (
        "{% set n = namespace(x=7) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}"
        "{{ n.x > 1 }}"
    ),
    "lists": "{% set l = range(100000) | list %}{{ (l * 10000) | length }}",
    "batch": "{{ range(3) | batch(10**9, 'x') | list | length }}",
    "slice": "{{ range(99999) | slice(10**9) | list | length }}",
    "replace": "{{ ('a' * 1000000) | replace('', 'b' * 1000) }}",
    "wordwrap": "{{ ('a ' * 10000000) | wordwrap(3) | length }}",
    "groupby": "{{ (range(99999) | list * 20) | groupby('real') | list | length }}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "a long text": "{{ 'x' * 4000000 }}{{ 'y' * 1000000 }}",
}  # fmt: skip
REFUSED = {
    "a range": "{% for i in range(10**9) %}x{% endfor %}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a file": "{% include '/etc/passwd' %}",
    "the inside of Python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "brackets": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "blocks": "{% if 1 %}" * 200 + "{% endif %}" * 200,
    "an open block": "{% if 1 %}",
    "its own words": "{{ raise_exception('no\\n\\x1b[2Jsystem') }}",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return open_tokenizer(save_chat_tokenizer(tmp_path_factory.mktemp("chat_template")))


# a tick in the middle of another library's gc callback is lost, and the next one counts
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_is_ended(
    tokenizer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    before = peak_mb()
    start = time.thread_time()
    with pytest.raises(LimitError, match=r"the chat template (has not finished|wants more|makes)"):
        render(tokenizer, CHAT, template=ENDLESS[name])
    assert time.thread_time() - start < chat_template.SECONDS + 2
    assert peak_mb() - before < chat_template.BYTES / 2**20 + 100
    assert render(tokenizer, CHAT) == transformers_text(tokenizer, CHAT)


def test_an_end_is_not_ended_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next tick comes while the first one's exception is still on its way to the user."""
    stop, ticks = chat_template._stop_clock, [1]

    def heard_late() -> None:
        if ticks:
            ticks.pop()
            chat_template._on_tick(0, None)
        stop()

    monkeypatch.setattr(chat_template, "_stop_clock", heard_late)
    monkeypatch.setattr(chat_template, "SECONDS", 0.0)
    with pytest.raises(LimitError, match="has not finished"), chat_template.limited(CHAT):
        raise chat_template._OutOfTime
    assert not ticks and chat_template._deadline is None


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_sandbox_refuses_is_one_printable_line(tokenizer, name: str) -> None:
    with pytest.raises(ChatError, match="the chat template refuses it") as caught:
        render(tokenizer, CHAT, template=REFUSED[name])
    assert str(caught.value).isprintable()


def test_limits_end_with_the_rendering(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has rendered may take memory and time again."""
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    before = resource.getrlimit(resource.RLIMIT_AS)
    for template in (CHATML, ENDLESS["indent"], REFUSED["a range"]):
        with contextlib.suppress(ValueError):
            render(tokenizer, CHAT, template=template)
        assert resource.getrlimit(resource.RLIMIT_AS) == before
    end = time.thread_time() + chat_template.SECONDS + 0.5
    while time.thread_time() < end:
        pass
    assert len(bytearray(chat_template.BYTES + 2**20)) > chat_template.BYTES


def test_a_limit_that_is_there_already_stays(tokenizer) -> None:
    """A user's `ulimit -v` is lower than what a template may take."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    own = (used + 64 * 2**20, before[1])
    resource.setrlimit(resource.RLIMIT_AS, own)
    try:
        assert render(tokenizer, CHAT)
        assert resource.getrlimit(resource.RLIMIT_AS) == own
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_memory_is_limited_on_another_thread_too(tokenizer) -> None:
    found: list[Exception] = []

    def work() -> None:
        try:
            render(tokenizer, CHAT, template=ENDLESS["indent"])
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(found[0], LimitError)


def test_a_long_chat_has_room(tokenizer) -> None:
    """16 MB of a single message, the longest row that is read by default."""
    chat = [{"role": "user", "content": "日本語 " * (2**22)}, CHAT[1]]
    assert len(render(tokenizer, chat)) > 2**24


def test_texts_are_those_of_transformers(tokenizer) -> None:
    chats = [row["messages"] for row in chat_rows(30, seed=11)] + TURNS
    for chat in chats:
        assert render(tokenizer, chat) == transformers_text(tokenizer, chat)
        asked = chat[:-1]
        assert render(tokenizer, asked, add_generation_prompt=True) == transformers_text(
            tokenizer, asked, add_generation_prompt=True
        )
    assert render(tokenizer, TOOL_TURNS, tools=TOOLS) == transformers_text(
        tokenizer, TOOL_TURNS, tools=TOOLS
    )
    thought = [CHAT[0], {"role": "assistant", "content": "a", "reasoning": "so", "name": None}]
    template = "{% for m in messages %}{{ m }}{% endfor %}"
    for written in (render, lambda *a, **k: render_marked(*a, tools=None, **k).text):
        assert written(tokenizer, thought, template=template) == transformers_text(
            tokenizer, thought, chat_template=template
        )


def test_markers_do_not_change_the_text_and_enclose_what_they_enclose(tokenizer) -> None:
    for chat, tools in [*((turns, None) for turns in TURNS), (TOOL_TURNS, TOOLS)]:
        text, spans = render_marked(tokenizer, chat, tools=tools, template=MARKED)
        assert text == transformers_text(tokenizer, chat, tools=tools)
        said = [m for m in chat if m["role"] == "assistant"]
        assert len(spans) == len(said)
        for (begin, end), message in zip(spans, said, strict=True):
            assert text[:begin].endswith("<|im_start|>assistant")
            assert text[begin:end].endswith("<|im_end|>")
            assert message["content"] in text[begin:end]


def test_the_template_is_the_one_that_apply_chat_template_chooses(
    tokenizer, tmp_path: Path
) -> None:
    """The folder's own, saved and read as transformers does it."""
    many = open_tokenizer(save_chat_tokenizer(tmp_path / "one"))
    many.chat_template = {"default": "D", "tool_use": "T", "rag": "R"}
    many.save_pretrained(tmp_path / "many")
    many = open_tokenizer(tmp_path / "many")
    for tools, expected in ((None, "D"), (TOOLS, "T"), ([], "T")):
        assert template_for(many, tools) == expected
        assert render(many, CHAT, tools=tools) == transformers_text(many, CHAT, tools=tools)
    assert template_for(many, TOOLS, "given") == "given"
    assert template_for(tokenizer, TOOLS) == template_for(tokenizer, None) == CHATML
    many.chat_template = {"rag": "R"}
    with pytest.raises(UserError, match=r"no chat template .*no default specified"):
        template_for(many, None)


def test_what_a_template_leaves_out_is_named(tokenizer) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    chat = [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": ' a "quoted"\nword'},
        {"role": "assistant", "content": "so</think>  yes", "tool_calls": [call]},
    ]
    whole = 'Be brief. a "quoted"\nword so</think>  yes weather'
    assert lost_turns(whole, chat) == []
    assert lost_turns("Be brief.\n" + json.dumps(chat[1]) + "yes weather", chat) == []
    assert lost_turns("", chat) == [
        "turn 1 (system)", "turn 2 (user)", "turn 3 (assistant)", "the call of weather in turn 3",
    ]  # fmt: skip
    assert lost_turns("", chat, [1]) == ["turn 2 (user)"]


@pytest.mark.parametrize(
    ("template", "lost"),
    [
        (CHATML, []),
        (CHATML.replace("if tools", "if nothing"), ["the tools"]),
        (CHATML.replace("message.tool_calls or []", "[]"), ["the calls of tools"]),
        ("{{ messages[0].content }}", ["the tools", "the calls of tools"]),
        ("{{ messages[1].content }}", ["tool weather", "the calls of tools"]),
    ],
)
def test_tools_are_lost_though_their_names_are_in_the_messages(tokenizer, template, lost) -> None:
    text = render(tokenizer, TOOL_TURNS, tools=TOOLS, template=template)
    assert lost_tools(tokenizer, text, TOOL_TURNS, TOOLS, template=template) == lost


def transformers_text(tokenizer: Any, chat: list[dict[str, Any]], **keywords: Any) -> str:
    return tokenizer.apply_chat_template(chat, tokenize=False, **keywords)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
