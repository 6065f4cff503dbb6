"""Rows of the known formats as chats: messages in OpenAI's form, whatever the row looked like.

Known are Alpaca's columns, ShareGPT's conversations and OpenAI's messages, each also with `chosen`
and `rejected` answers for preference pairs, and Hugging Face's preference columns. Column names and
tags are MindSpeed-LLM's and LLaMA-Factory's (`--map-keys`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from qwen2_ascend.chat_template import REASONING_KEYS
from qwen2_ascend.errors import UserError, shown
from qwen2_ascend.files import json_kind, json_value

Row = Mapping[str, Any]
Message = dict[str, Any]

COLUMNS = {
    "alpaca": {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "history": "history",
    },
    "sharegpt": {"messages": "conversations"},
    "openai": {"messages": "messages"},
    "preference": {"prompt": "prompt"},
}
"""What each format's columns are called, besides COMMON_COLUMNS."""
COMMON_COLUMNS = {name: name for name in ("system", "tools", "chosen", "rejected")}
TAGS = {
    "sharegpt": {"role_tag": "from", "content_tag": "value"},
    "openai": {"role_tag": "role", "content_tag": "content"},
}
ROLE_TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}
"""Tags of --map-keys that name a role, and the role."""
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "function_call",
    "observation": "tool",
    "tool": "tool",
    "function": "tool",
    "system": "system",
    "developer": "system",
}
"""What roles are called in files, and the role; a function_call becomes an assistant's."""


TRAINED = ("weight", "loss", "loss_mask", "train", "training", "trainable")
"""Keys by which OpenAI, ms-swift, slime, verl and axolotl say whether a message is trained on."""
UNWANTED = ("label", "kto_tag")
"""Keys by which data for KTO says false of a row whose answer is a bad one."""
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Keys of what a language model cannot see, in the files of ms-swift and LLaMA-Factory."""
REJECTED = ("rejected_response", "rejected_messages")
"""What ms-swift calls the answer that the last of the messages is chosen over."""
FUNCTIONS = "functions"
"""What OpenAI's older files call the tools."""
MESSAGE_KEYS = frozenset(
    (
        *("role", "content", "tool_calls", "function_call", "name", "tool_call_id", "id"),
        *(*REASONING_KEYS, *TRAINED),
    )
)
"""Keys of a message that mean something here, or to a chat template."""


class Chat(NamedTuple):
    """A conversation."""

    messages: list[Message]
    """The messages in the form that chat templates take."""
    tools: list[dict[str, Any]] | None
    trained: tuple[int, ...]
    """Which messages the loss is on; all of them the assistant's, at least one."""


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """How the rows of a file are read."""

    kind: str
    """alpaca, sharegpt, openai or preference."""
    task: str
    """sft, or dpo for pairs."""
    columns: Mapping[str, str]
    tags: Mapping[str, str]

    def chats(self, row: Row) -> list[Chat]:
        """The row's chat; of a preference pair the chosen one and the rejected one.

        Raises:
            ValueError: it is none; the message is the reason.
        """
        if not isinstance(row, Mapping):
            raise ValueError(f"is a {json_kind(row)}, not an object")
        for key in TRAINED:
            if key not in self.columns.values() and not _is_trained(row, key, "the row"):
                raise ValueError(f"says {key}={row[key]!r} of itself, so it is not trained on")
        for key in UNWANTED:
            if row.get(key) is False and key not in self.columns.values():
                raise ValueError(f"says {key}=false of its answer, so it is not trained on")
        for key in MEDIA:
            if row.get(key) and key not in self.columns.values():
                raise ValueError(f"has {key!r}, which a language model cannot see")
        if self.task == "dpo":
            return self._pair(row)
        messages = self._alpaca(row) if self.kind == "alpaca" else self._messages(row)
        return [_chat(messages, self._tools(row), 0)]

    def unknown_keys(self, row: Row) -> set[str]:
        """What the row and its messages have that means nothing here, for a list of such keys."""
        known_keys = {*self.columns.values(), *TRAINED, *MEDIA, FUNCTIONS}
        known_keys |= set(REJECTED) if self.task == "dpo" else set()
        known_keys |= {key for key in UNWANTED if isinstance(row.get(key), bool)}
        unknown = {repr(key) for key in row if key not in known_keys}
        known = {self.tags["content_tag"], self.tags["role_tag"], *MESSAGE_KEYS}
        for column in self.columns.values():
            value = row.get(column)
            for turn in value if isinstance(value, list) else [value]:
                if isinstance(turn, Mapping) and self.tags["role_tag"] in turn:
                    unknown |= {f"{key!r} of a message" for key in turn if key not in known}
        return unknown

    def describe(self) -> str:
        """The format and the columns, as a file's headline says them."""
        pairs = " preference pairs" if self.task == "dpo" else ""
        names = {"alpaca": "Alpaca", "sharegpt": "ShareGPT", "openai": "OpenAI messages"}
        usual = TAGS.get(self.kind, TAGS["openai"])
        roles = [f"{k}={v}" for k, v in self.tags.items() if usual.get(k) != v]
        columns = {**COLUMNS[self.kind], **COMMON_COLUMNS}
        other = [f"{k}={v}" for k, v in self.columns.items() if columns.get(k) != v]
        name = names.get(self.kind, "Hugging Face") + pairs
        return f"{name} ({', '.join(roles + other)})" if roles + other else name

    def _column(self, row: Row, name: str) -> Any:
        return row.get(self.columns[name])

    # --- chats ------------------------------------------------------------------------------------

    def _alpaca(self, row: Row, *, answered: bool = True) -> list[Message]:
        parts = [self._text(row, name) for name in ("prompt", "query")]
        question = "\n".join(part for part in parts if part)
        if not question:
            raise ValueError(f"{self.columns['prompt']!r} is empty")
        messages = self._system(row)
        for turn in self._column(row, "history") or []:
            if not (isinstance(turn, Sequence) and len(turn) == 2):
                raise ValueError(f"{self.columns['history']!r} is not a list of pairs")
            messages += [_said("user", turn[0]), _said("assistant", turn[1])]
        messages.append(_said("user", question))
        if answered:
            if self.columns["response"] not in row:
                raise ValueError(_no_column(row, self.columns["response"]))
            messages.append(_said("assistant", self._text(row, "response")))
        return messages

    def _text(self, row: Row, name: str) -> str:
        value = self._column(row, name)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{self.columns[name]!r} is {shown(value)}, not a string")
        return value or ""

    def _messages(self, row: Row, name: str = "messages") -> list[Message]:
        if self.columns[name] not in row:
            raise ValueError(_no_column(row, self.columns[name]))
        messages = self._read_messages(self._column(row, name), self.columns[name])
        system = self._system(row)
        if system and messages and messages[0]["role"] == "system":
            if messages[0]["content"] != system[0]["content"]:
                raise ValueError(f"has two system prompts, one of them as {self.columns['system']}")
            return messages
        return system + messages

    def _system(self, row: Row) -> list[Message]:
        text = self._text(row, "system")
        return [_said("system", text)] if text else []

    def _tools(self, row: Row) -> list[dict[str, Any]] | None:
        value = self._column(row, "tools")
        if value is None and FUNCTIONS not in self.columns.values():
            value = row.get(FUNCTIONS)
        if isinstance(value, str):
            value = _json(value, repr(self.columns["tools"])) if value.strip() else None
        if value is None or value == {}:
            return None
        if isinstance(value, Mapping):
            value = [value]
        if not (isinstance(value, list) and all(isinstance(tool, Mapping) for tool in value)):
            raise ValueError(f"{self.columns['tools']!r} is not a list of objects")
        return [
            {"type": "function", "function": tool}
            if "name" in tool and "function" not in tool
            else dict(tool)
            for tool in value
        ]

    def _read_messages(self, value: Any, where: str) -> list[Message]:
        if isinstance(value, str) and value.lstrip().startswith("["):
            value = _json(value, repr(where))
        if not isinstance(value, list) or not value:
            raise ValueError(
                f"{where!r} is not a list of turns" if value else f"{where!r} is empty"
            )
        return [self._read_message(turn, i, where) for i, turn in enumerate(value, 1)]

    def _read_message(self, turn: Any, number: int, where: str) -> Message:
        role_tag, content_tag = self.tags["role_tag"], self.tags["content_tag"]
        if not isinstance(turn, Mapping) or role_tag not in turn:
            raise ValueError(f"turn {number} of {where!r} has no {role_tag!r}")
        named = {self.tags[tag]: role for tag, role in ROLE_TAGS.items() if tag in self.tags}
        given = turn[role_tag]
        role = (ROLES | named).get(given) if isinstance(given, str) else None
        if role is None:
            known = ", ".join(dict.fromkeys([*named, *ROLES]))
            raise ValueError(
                f"turn {number} of {where!r} is from {shown(given)}; known are {known}"
            )
        rest = {
            key: value
            for key, value in turn.items()
            if key not in (role_tag, content_tag, "tool_calls", "function_call")
            and value is not None
        }
        message = rest | {"role": role, "content": _content(turn.get(content_tag), number)}
        calls = turn.get("tool_calls") or turn.get("function_call")
        if role == "function_call":
            calls = _json(message["content"], f"the function call in turn {number}")
            message |= {"role": "assistant", "content": ""}
        if calls:
            calls = calls if isinstance(calls, list) else [calls]
            message["tool_calls"] = [_tool_call(call, number) for call in calls]
        return message

    # --- preference pairs -------------------------------------------------------------------------

    def _pair(self, row: Row) -> list[Chat]:
        if self.kind in TAGS and self._column(row, "chosen") is None and _has_rejected(row):
            prompt, answers = self._swift_pair(row)
        else:
            prompt, answers = self._prompt(row), self._answers(row)
        if answers[0] == answers[1]:
            raise ValueError("chosen and rejected are the same")
        start = len(prompt)
        first = answers[0][0]["role"]
        if not prompt or first != "assistant":  # the answers are whole conversations
            prompt = self._system(row) if first != "system" else []
            start = len(prompt) + _common_turns(*answers)
        tools = self._tools(row)
        return [_chat(prompt + answer, tools, start) for answer in answers]

    def _swift_pair(self, row: Row) -> tuple[list[Message], list[list[Message]]]:
        """ms-swift's: the messages end with the chosen answer; the rejected one is beside them."""
        messages = self._messages(row)
        given = row.get("rejected_messages")
        if given is not None:  # a whole conversation
            start = self._system(row) if messages[0]["role"] == "system" else []
            rejected = self._read_messages(given, "rejected_messages")
            system = start if rejected[0]["role"] != "system" else []
            return [], [messages, system + rejected]
        if messages[-1]["role"] != "assistant":
            raise ValueError(
                f"{self.columns['messages']!r} does not end with an answer of the assistant, which "
                "would be chosen over 'rejected_response'"
            )
        return messages[:-1], [messages[-1:], [_said("assistant", row["rejected_response"])]]

    def _prompt(self, row: Row) -> list[Message]:
        if self.kind == "alpaca":
            return self._alpaca(row, answered=False)
        if self.kind != "preference":
            return self._messages(row)
        value = self._column(row, "prompt")
        if isinstance(value, str):
            return [*self._system(row), _said("user", value)]
        return self._messages(row, "prompt") if value else []

    def _answers(self, row: Row) -> list[list[Message]]:
        values = [self._column(row, name) for name in ("chosen", "rejected")]
        both = self._column(row, "response") if self.kind == "alpaca" else None
        if values == [None, None] and isinstance(both, list) and len(both) == 2:
            values = both
        answers = []
        for name, value in zip(("chosen", "rejected"), values, strict=True):
            if value is None or value in ("", []):
                raise ValueError(f"{self.columns[name]!r} is missing or empty")
            if isinstance(value, str):
                answers.append([_said("assistant", value)])
            else:
                turns = [value] if isinstance(value, Mapping) else value
                answers.append(self._read_messages(turns, self.columns[name]))
        return answers


def _chat(messages: list[Message], tools: list[dict[str, Any]] | None, start: int) -> Chat:
    """The chat, when it is one; the loss is on what the assistant says from turn `start` on.

    A message that says so, by one of the keys TRAINED, is not trained on.
    """
    trained = []
    messages = [dict(message) for message in messages]  # the sides of a pair share some
    for i, message in enumerate(messages):
        role = message["role"]
        if role in ("user", "assistant") and not (message["content"] or message.get("tool_calls")):
            raise ValueError(f"turn {i + 1} ({role}) is empty")
        where = f"turn {i + 1} ({role})"
        is_trained = all([_is_trained(message, key, where) for key in TRAINED])
        if role != "assistant" and any(message.get(key) for key in TRAINED):
            raise ValueError(f"{where} asks to be trained on, which only an assistant's can be")
        if is_trained and role == "assistant" and i >= start:
            trained.append(i)
        for key in TRAINED:
            message.pop(key, None)
    if not trained:
        raise ValueError("the assistant says nothing to train on")
    return Chat(messages, tools, tuple(trained))


def _has_rejected(row: Row) -> bool:
    """Whether the rejected answer is where ms-swift has it."""
    return any(row.get(key) is not None for key in REJECTED)


def _is_trained(holder: Mapping[str, Any], key: str, where: str) -> bool:
    """What a key of TRAINED says, yes where it is absent.

    Raises:
        ValueError: neither yes nor no.
    """
    value = holder.get(key)
    if value is None:
        return True
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise ValueError(
            f"{where} has {key}={value!r}; known are 0, 1, false and true; where the key means "
            "something else, leave it out"
        )
    return bool(value)


def _said(role: str, text: Any) -> Message:
    if not isinstance(text, str):
        raise ValueError(f"what the {role} says is {shown(text)}, not a string")
    return {"role": role, "content": text}


def _content(value: Any, number: int) -> str:
    """A message's text; of a list of parts the texts."""
    if isinstance(value, str) or value is None:
        return value or ""
    if isinstance(value, list):
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in value]
        strings = [text for text in texts if isinstance(text, str)]
        if len(strings) < len(texts):
            raise ValueError(f"turn {number} holds something other than text")
        return "".join(strings)
    raise ValueError(f"turn {number} is {shown(value)}, not a string")


def _tool_call(call: Any, number: int) -> dict[str, Any]:
    """A tool call with its arguments as an object: templates write them as JSON themselves."""
    outer = dict(call) if isinstance(call, Mapping) else {}
    function = outer.pop("function", None) or outer
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"a tool call in turn {number} has no function name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _json(arguments, f"the arguments in turn {number}") if arguments else {}
    if not isinstance(arguments, Mapping | None):
        raise ValueError(f"the arguments in turn {number} are {type(arguments).__name__}")
    named = {"name": function["name"], "arguments": dict(arguments or {})}
    ids = {key: value for key, value in outer.items() if key == "id" and value}
    return {**ids, "type": "function", "function": named}


def _common_turns(chosen: list[Message], rejected: list[Message]) -> int:
    """How many turns two whole conversations begin with in common; the next is the assistant's."""
    start = 0
    while start < min(len(chosen), len(rejected)) and chosen[start] == rejected[start]:
        start += 1
    nexts = [answer[start : start + 1] for answer in (chosen, rejected)]
    if not start or not all(turn and turn[0]["role"] == "assistant" for turn in nexts):
        raise ValueError("chosen and rejected do not part at an answer of the assistant")
    return start


def _json(text: str, what: str) -> Any:
    try:
        return json_value(text)
    except ValueError:
        raise ValueError(f"{what} is not JSON") from None


def _no_column(row: Row, name: str) -> str:
    if name in row:
        return f"{name!r} is {shown(row[name])}, which is nothing to train on"
    return f"has no {name!r}; it has {', '.join(map(repr, list(row)[:8])) or 'nothing'}"


# --- finding out ----------------------------------------------------------------------------------


def parse_map_keys(text: str | None) -> dict[str, Any]:
    """Reads --map-keys, in MindSpeed-LLM's form or as an entry of LLaMA-Factory's dataset_info.

    Raises:
        UserError: not JSON, or a name that means nothing.
    """
    if text is None:
        return {}
    try:
        given = json_value(text)
    except ValueError as error:
        raise UserError(f"--map-keys {text}: is not JSON ({error}).") from None
    if not isinstance(given, dict):
        raise UserError(f"--map-keys {text}: is no JSON object.")
    keys = {**given.pop("columns", {}), **given}
    known = {name for columns in COLUMNS.values() for name in columns} | set(COMMON_COLUMNS)
    tags = {"role_tag", "content_tag", *ROLE_TAGS}
    wrong = [k for k in keys if k not in known | {"tags"}]
    wrong += [k for k in keys.get("tags", {}) if k not in tags]
    if wrong:
        raise UserError(
            f"--map-keys: {', '.join(wrong)} means nothing; columns are {', '.join(sorted(known))} "
            f"and tags {', '.join(sorted(tags))}."
        )
    return keys


def row_format(kind: str, task: str, map_keys: Mapping[str, Any]) -> RowFormat:
    """The format `kind`, with the columns and tags of --map-keys."""
    given = {key: name for key, name in map_keys.items() if key != "tags" and name}
    return RowFormat(
        kind=kind,
        task=task,
        columns={**COMMON_COLUMNS, **COLUMNS[kind], **given},
        tags={**TAGS.get(kind, TAGS["openai"]), **map_keys.get("tags", {})},
    )


def read_chat(
    messages: Sequence[Mapping[str, Any]], tools: Any
) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """A chat to be answered, as a chat that is trained on is read: the model has seen it so.

    Messages of roles that are known to a chat template alone stay as they are.

    Raises:
        ValueError: it cannot be read; the message is the reason.
    """
    form = row_format("openai", "sft", {})
    read = []
    for number, message in enumerate(messages, 1):
        if message.get("role") not in ROLES:
            read.append(dict(message))
            continue
        read.append(form._read_message(message, number, "messages"))
        if message.get("content") is None and not read[-1].get("tool_calls"):
            raise ValueError(f"turn {number} ({message['role']}) says nothing")
    return read, form._tools({form.columns["tools"]: tools})


def detect_format(row: Any, task: str, map_keys: Mapping[str, Any]) -> RowFormat:
    """The format that `row` is in.

    Raises:
        ValueError: in none; the message says what is missing.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"is a {json_kind(row)}, not an object")
    chosen = [map_keys.get(name, name) for name in ("chosen", "rejected")]
    has_pair = all(row.get(name) is not None for name in chosen)
    names = [map_keys["messages"]] if "messages" in map_keys else ["messages", "conversations"]
    for name in names:
        if name in row and (kind := _turn_kind(row[name], map_keys)):
            found = row_format(kind, task, {**map_keys, "messages": name})
            break
    else:
        alpaca = row_format("alpaca", task, map_keys)
        response = alpaca.columns["response"]
        if alpaca.columns["prompt"] in row and (response in row or has_pair):
            found = alpaca
        elif has_pair:
            found = row_format("preference", task, map_keys)
            turns = next((row[c] for c in chosen if isinstance(row[c], list | Mapping)), None)
            if turns is not None and _turn_kind(turns, map_keys) == "sharegpt":
                tags = {**TAGS["sharegpt"], **map_keys.get("tags", {})}
                found = row_format("preference", task, {**map_keys, "tags": tags})
        else:
            raise ValueError(
                f"{_no_column(row, 'messages')}; chats have 'messages', 'conversations' or "
                "'instruction' and 'output'; --map-keys says what they are called here"
            )
    has_pair = has_pair or isinstance(row.get(found.columns.get("response", "")), list)
    has_pair = has_pair or (found.kind in TAGS and _has_rejected(row))
    if task == "dpo" and not has_pair:
        raise ValueError(f"{_no_column(row, chosen[0])}; --task dpo takes preference pairs")
    if task == "sft" and found.kind == "preference":
        raise ValueError("holds preference pairs; they are for --task dpo")
    return found


def _turn_kind(value: Any, map_keys: Mapping[str, Any]) -> str | None:
    """sharegpt or openai, by the tags in the first of the turns."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json_value(value)
        except ValueError:
            return None
    turn = value[0] if isinstance(value, list) and value else value
    if not isinstance(turn, Mapping):
        return None
    if "role_tag" in map_keys.get("tags", {}):
        return "sharegpt" if map_keys["tags"]["role_tag"] in turn else None
    return next((kind for kind, tags in TAGS.items() if tags["role_tag"] in turn), None)
