"""Chats as a tokenizer's chat template writes them: the same template and text everywhere.

The choice is `apply_chat_template`'s: with tools the template called tool_use, where there is one,
else the default one. A template is a program by whoever made the folder. transformers' sandbox
keeps it from files and processes; here it gets so much time, memory and text, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from qwen2_ascend.errors import UserError
from qwen2_ascend.pretrained import one_line

SECONDS = 2.0
"""Processor time that one chat may take; a real one takes about a thousandth of a second."""
BYTES = 128 * 2**20
"""Memory that one chat may take, besides BYTES_PER_CHARACTER."""
BYTES_PER_CHARACTER = 64
CHARACTERS = 4 * 2**20
"""Longest text of a chat, besides CHARACTERS_PER_CHARACTER."""
CHARACTERS_PER_CHARACTER = 8
THOUGHT = "</think>"
"""What Qwen's and DeepSeek's reasoning models end their reasoning with, before they answer."""
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that hold what was thought before its content."""
GENERATION_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

Messages = Sequence[Mapping[str, Any]]


class LimitError(UserError):
    """A chat template takes more than a template may; other chats would meet it, too."""


class ChatError(ValueError):
    """A chat that its template does not write as it is."""


class Rendered(NamedTuple):
    """A chat's text."""

    text: str
    spans: list[tuple[int, int]]
    """Where the text between `{% generation %}` markers begins and ends."""


def template_for(tokenizer: Any, tools: Sequence[Any] | None, given: str | None = None) -> str:
    """The template of a chat with these tools: `given`, or the tokenizer's.

    Raises:
        UserError: there is none.
    """
    if given is not None:
        return given
    try:
        return tokenizer.get_chat_template(tools=tools)
    except Exception as error:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template ({one_line(error)}); "
            "give --chat-template FILE, or the tokenizer of an instruct model."
        ) from None


def all_templates(tokenizer: Any, given: str | None = None) -> dict[str, str]:
    """Every template that `template_for` chooses from, by name.

    Raises:
        UserError: there is none.
    """
    if given is None and isinstance(tokenizer.chat_template, Mapping):
        return dict(tokenizer.chat_template)
    return {"default": template_for(tokenizer, None, given)}


def render(
    tokenizer: Any,
    messages: Messages,
    *,
    tools: Sequence[Any] | None = None,
    template: str | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
) -> str:
    """A chat as `apply_chat_template` writes it, within the limits.

    Raises:
        LimitError: the template takes too much.
        ChatError: it refuses the chat.
        UserError: there is none.
    """
    with limited(messages), _refusals():
        text = tokenizer.apply_chat_template(
            list(messages),
            tools=tools,
            chat_template=template_for(tokenizer, tools, template),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        _check_length(text, messages)
    return text


def render_marked(
    tokenizer: Any, messages: Messages, *, tools: Sequence[Any] | None, template: str
) -> Rendered:
    """A chat, and where the template says between markers that the assistant speaks.

    transformers gives these places as tokens only, and some of them wrongly: a character of several
    tokens at a span's end, a span of a single token at the start.

    Raises:
        LimitError, ChatError: as `render`.
    """
    with limited(messages), _refusals():
        text, spans = _with_spans(tokenizer, messages, tools, template)
        _check_length(text, messages)
    return Rendered(text, spans)


def _with_spans(
    tokenizer: Any, messages: Messages, tools: Sequence[Any] | None, template: str
) -> tuple[str, list[tuple[int, int]]]:
    from transformers.utils import chat_template_utils

    utils: Any = chat_template_utils
    chat = [{k: v for k, v in message.items() if v is not None} for message in messages]
    tools = None if tools is None else list(tools)
    if hasattr(utils, "render_jinja_template"):
        texts, spans = utils.render_jinja_template(
            [chat],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        return texts[0], spans[0]
    return utils._render_with_assistant_indices(  # before transformers 4.53
        compiled_template=utils._compile_jinja_template(template),
        messages=chat,
        tools=tools,
        documents=None,
        add_generation_prompt=False,
        **tokenizer.special_tokens_map,
    )


def lost_tools(
    tokenizer: Any,
    text: str,
    messages: Messages,
    tools: Sequence[Any] | None,
    *,
    template: str | None = None,
    add_generation_prompt: bool = False,
) -> list[str]:
    """What of a chat's tools and their calls is not in its text, in words.

    That a name is in the text is not enough, because messages may hold it too: with tools or calls
    of another name the chat has to be another text.
    """
    options: dict[str, Any] = {
        "template": template_for(tokenizer, tools, template),
        "add_generation_prompt": add_generation_prompt,
    }

    def is_the_same(messages: Messages, tools: Sequence[Any] | None) -> bool:
        try:
            return render(tokenizer, messages, tools=tools, **options) == text
        except ChatError:
            return False

    names = map(_tool_name, tools or [])
    lost = [f"tool {one_line(name, 40)}" for name in names if name not in text]
    if tools and not lost and is_the_same(messages, [_renamed(tool) for tool in tools]):
        lost.append("the tools")
    if any(map(_calls, messages)):
        others = [
            {**m, "tool_calls": [_renamed(call) for call in calls]} if (calls := _calls(m)) else m
            for m in messages
        ]
        lost += ["the calls of tools"] if is_the_same(others, tools) else []
    return lost


def lost_turns(text: str, messages: Messages, turns: Iterable[int] | None = None) -> list[str]:
    """The messages, or those of these numbers, that are not in a text, and the calls in them.

    Their reasoning may be lost: templates leave it out of what was said before. For turns that are
    trained on there is `lost_reasoning`.
    """
    lost = []
    for turn in range(len(messages)) if turns is None else turns:
        message = messages[turn]
        if not _is_in(message.get("content"), text):
            lost.append(f"turn {turn + 1} ({one_line(message.get('role'), 40)})")
        lost += [
            f"the call of {one_line(name, 40)} in turn {turn + 1}"
            for name in map(_tool_name, _calls(message))
            if name not in text
        ]
    return lost


def lost_reasoning(text: str, messages: Messages, turns: Iterable[int]) -> list[str]:
    """What the messages of these numbers have thought and is not in a text, in words."""
    lost = []
    for turn in turns:
        message = messages[turn]
        content = message.get("content")
        before, tag, _ = content.partition(THOUGHT) if isinstance(content, str) else ("", "", "")
        thought = [before.replace("<think>", "")] if tag else []
        thought += [t for key in REASONING_KEYS if isinstance(t := message.get(key), str)]
        if not all(_is_in(part, text) for part in thought):
            lost.append(f"the reasoning of turn {turn + 1} ({one_line(message.get('role'), 40)})")
    return lost


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """The special tokens and their texts, whether tokenizer_config.json has names for them or not.

    Decoding leaves them out of a text.
    """
    added = tokenizer.added_tokens_decoder.items()
    special = {token_id: str(token) for token_id, token in added if token.special}
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    return special | dict(named)


def end_of_turn(tokenizer: Any, template: str | None = None) -> int | None:
    """The special token that the chat template ends an answer with, which chats teach a model."""
    mark = "answer"
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}]
    try:
        text = render(tokenizer, chat, template=template)
        rest = text[text.rindex(mark) + len(mark) :]
    except ValueError:  # no template, or one that takes no such chat
        return None
    first = next(iter(tokenizer(rest, add_special_tokens=False).input_ids), None)
    return first if first in special_tokens(tokenizer) else None


def _is_in(content: Any, text: str) -> bool:
    """Whether a template has written a message, at least without its reasoning, or as JSON."""
    if not isinstance(content, str):
        return True  # parts of a message, which templates write as they like
    said = content.strip()
    if said in text:
        return True
    return said.split(THOUGHT)[-1].strip() in text or (
        json.dumps(said, ensure_ascii=False)[1:-1] in text or json.dumps(said)[1:-1] in text
    )


def _calls(message: Mapping[str, Any]) -> list[Any]:
    calls = message.get("tool_calls")
    return calls if isinstance(calls, list) else []


def _renamed(tool: Any) -> Any:
    """The same tool or call under another name."""
    if not isinstance(tool, Mapping):
        return tool
    if isinstance(tool.get("function"), Mapping):
        return {**tool, "function": _renamed(tool["function"])}
    return {**tool, "name": f"{tool.get('name')}_"}


def _tool_name(tool: Any) -> str:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    named = function if isinstance(function, Mapping) else tool
    name = named.get("name") if isinstance(named, Mapping) else None
    return name if isinstance(name, str) else ""


# --- limits ---------------------------------------------------------------------------------------


class _OutOfTime(BaseException):
    """Raised in the middle of a rendering; no `except Exception` on the way may keep it."""


_is_limited = False
_deadline: float | None = None
"""The main thread's processor time at which `_on_tick` ends a rendering."""


@contextlib.contextmanager
def limited(messages: Messages) -> Iterator[None]:
    """Holds all renderings of a chat that are in the block to what one chat may take.

    For that long the whole process cannot get more address space than that, so nothing else should
    be under way in it. Time is only measured on the main thread, where Python hears signals.

    Raises:
        LimitError: they take more.
    """
    global _is_limited
    if _is_limited:
        yield
        return
    _is_limited = True
    before = _limit_memory(BYTES + BYTES_PER_CHARACTER * _characters(messages))
    try:
        try:
            _start_clock()
            yield
        finally:
            _stop_clock()  # a tick that is heard here, after memory was given back, is the same end
    except _OutOfTime:
        raise LimitError(
            f"the chat template has not finished after {SECONDS:g} seconds of processor time; "
            "take another tokenizer, or give --chat-template."
        ) from None
    except MemoryError:
        raise LimitError(
            f"the chat template wants more than {BYTES // 2**20} MB of memory for one chat; take "
            "another tokenizer, or give --chat-template."
        ) from None
    finally:
        _stop_clock()
        if before is not None:
            resource.setrlimit(resource.RLIMIT_AS, before)
        _is_limited = False


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # jinja2's, or whatever the template's own code meets
        raise ChatError(f"the chat template refuses it: {one_line(error)}") from None


def _check_length(text: str, messages: Messages) -> None:
    size = _characters(messages)
    most = CHARACTERS + CHARACTERS_PER_CHARACTER * size
    if len(text) > most:
        raise LimitError(
            f"the chat template makes {len(text):,} characters of a chat of {size:,}, more than "
            f"{most:,}; take another tokenizer, or give --chat-template."
        )


def _characters(messages: Messages) -> int:
    texts = (message.get("content") for message in messages)
    return sum(len(text) for text in texts if isinstance(text, str))


def _limit_memory(num_bytes: int) -> tuple[int, int] | None:
    """Lets the process grow by so much; what was allowed before. None where this is not Linux."""
    try:
        file = os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return None
    try:
        used = int(os.read(file, 64).split()[0]) * resource.getpagesize()
    finally:
        os.close(file)
    before = soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = used + num_bytes
    if soft == resource.RLIM_INFINITY or wanted < soft:
        resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    return before


def _start_clock() -> None:
    global _deadline
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGVTALRM) is not _on_tick:
        # stays, because a tick that comes late would end the process by default
        signal.signal(signal.SIGVTALRM, _on_tick)
    _deadline = time.thread_time() + SECONDS
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, 0.1)


def _stop_clock() -> None:
    global _deadline
    if _deadline is not None:
        _deadline = None
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _on_tick(number: int, frame: object) -> None:
    # the timer counts all threads' time
    if _deadline is not None and time.thread_time() >= _deadline:
        raise _OutOfTime
