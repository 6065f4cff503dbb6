"""Every known kind of row gives the same chat, and what is none is said so."""

from __future__ import annotations

import json

import pytest
from chats import said

from qwen2_ascend.data.chat.formats import detect_format, parse_map_keys, row_format
from qwen2_ascend.errors import UserError


def read(row: dict, task: str = "sft", map_keys: dict | None = None, kind: str | None = None):
    keys = parse_map_keys(json.dumps(map_keys) if map_keys else None)
    found = row_format(kind, task, keys) if kind else detect_format(row, task, keys)
    return found, found.chats(row)


def spoken(chat) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in chat.messages]


def openai(turns) -> list[dict]:
    return [{"role": role, "content": text} for role, text in turns]


def sharegpt(turns) -> list[dict]:
    return [{"from": role, "value": text} for role, text in turns]


TWO_TURNS = [("user", "q1"), ("assistant", "a1"), ("user", "q2\ni2"), ("assistant", "a2")]
SYSTEM = [("system", "s"), *TWO_TURNS]


@pytest.mark.parametrize(
    ("row", "map_keys", "kind", "expected"),
    [
        (
            {"instruction": "q2", "input": "i2", "output": "a2", "history": [["q1", "a1"]]},
            None,
            "alpaca",
            TWO_TURNS,
        ),
        (
            {"instruction": "q2\ni2", "output": "a2", "history": [["q1", "a1"]], "system": "s"},
            None,
            "alpaca",
            SYSTEM,
        ),
        (
            {"q": "q2", "more": "i2", "a": "a2", "before": [["q1", "a1"]], "sys": "s"},
            {"prompt": "q", "query": "more", "response": "a", "history": "before", "system": "sys"},
            "alpaca",
            SYSTEM,
        ),
        (
            {
                "conversations": sharegpt(
                    ({"user": "human", "assistant": "gpt"}[r], text) for r, text in TWO_TURNS
                ),
                "system": "s",
            },
            None,
            "sharegpt",
            SYSTEM,
        ),
        ({"conversations": sharegpt(SYSTEM)}, None, "sharegpt", SYSTEM),
        ({"messages": openai(SYSTEM)}, None, "openai", SYSTEM),
        ({"conversations": openai(TWO_TURNS), "system": "s"}, None, "openai", SYSTEM),
        (
            {"messages": openai((role, [{"text": text}]) for role, text in SYSTEM)},
            None,
            "openai",
            SYSTEM,
        ),
        (
            {
                "chat": [
                    {"who": {"user": "U", "assistant": "A"}.get(r, r), "what": t} for r, t in SYSTEM
                ]
            },
            {
                "messages": "chat",
                "tags": {
                    "role_tag": "who",
                    "content_tag": "what",
                    "user_tag": "U",
                    "assistant_tag": "A",
                },
            },
            "sharegpt",
            SYSTEM,
        ),
    ],
)
def test_formats_are_found_and_give_the_same_chat(row, map_keys, kind, expected) -> None:
    found, (chat,) = read(row, map_keys=map_keys)
    assert found.kind == kind
    assert spoken(chat) == expected
    assert [chat.messages[i]["content"] for i in chat.trained] == ["a1", "a2"]
    assert chat.tools is None


def test_llama_factorys_columns_and_mindspeeds_handlers_mean_the_same() -> None:
    row = {"q": "hi", "a": "there"}
    nested = {"columns": {"prompt": "q", "response": "a"}}
    assert read(row, map_keys=nested)[1] == read(row, map_keys=nested["columns"])[1]


CALL = {"name": "f", "arguments": {"a": 1}}
FUNCTION = {"name": "f", "parameters": {}}
OPENAI_CALL = {
    "id": None,
    "type": "function",
    "function": {**CALL, "arguments": json.dumps(CALL["arguments"])},
}


@pytest.mark.parametrize(
    "row",
    [
        {
            "conversations": sharegpt(
                [
                    ("human", "q"),
                    ("function_call", json.dumps(CALL)),
                    ("observation", "r"),
                    ("gpt", "a"),
                ]
            ),
            "tools": json.dumps([FUNCTION]),
        },
        {
            "messages": [
                said("user", "q"),
                {"role": "assistant", "content": None, "tool_calls": [OPENAI_CALL]},
                said("tool", "r"),
                said("assistant", "a", tool_calls=None),
            ],
            "tools": [{"type": "function", "function": FUNCTION}],
        },
        {
            "messages": [
                said("user", "q"),
                said("assistant", "", function_call=CALL),
                said("function", "r"),
                said("assistant", "a"),
            ],
            "tools": FUNCTION,
        },
    ],
    ids=["sharegpt", "openai", "openai-legacy"],
)
def test_tool_calls_have_arguments_as_objects(row) -> None:
    """Templates write arguments as JSON; a string would be quoted once more."""
    (chat,) = read(row)[1]
    assert spoken(chat) == [("user", "q"), ("assistant", ""), ("tool", "r"), ("assistant", "a")]
    assert chat.messages[1]["tool_calls"] == [{"type": "function", "function": CALL}]
    assert chat.trained == (1, 3)
    assert chat.tools == [{"type": "function", "function": FUNCTION}]


def test_openais_weight_leaves_a_turn_out() -> None:
    turns = [("user", "q"), ("assistant", "bad"), ("user", "again"), ("assistant", "good")]
    messages = openai(turns)
    messages[1]["weight"] = 0
    (chat,) = read({"messages": messages})[1]
    assert chat.trained == (3,)
    assert all("weight" not in message for message in chat.messages)


# --- preference pairs -----------------------------------------------------------------------------

PROMPT = [("user", "q1"), ("assistant", "a1"), ("user", "q2")]
OPENAI_PROMPT = openai(PROMPT)
YES, NO = said("assistant", "yes"), said("assistant", "no")
CHOSEN, REJECTED = [*OPENAI_PROMPT, YES], [*OPENAI_PROMPT, NO]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": OPENAI_PROMPT, "chosen": "yes", "rejected": "no"}, "preference"),
        ({"prompt": OPENAI_PROMPT, "chosen": YES, "rejected": NO}, "preference"),
        ({"prompt": OPENAI_PROMPT, "chosen": [YES], "rejected": [NO]}, "preference"),
        ({"chosen": CHOSEN, "rejected": REJECTED}, "preference"),
        ({"prompt": "q2", "chosen": CHOSEN, "rejected": REJECTED}, "preference"),
        (
            {
                "conversations": sharegpt(PROMPT),
                "chosen": {"from": "gpt", "value": "yes"},
                "rejected": {"from": "gpt", "value": "no"},
            },
            "sharegpt",
        ),
        (
            {"instruction": "q2", "history": [["q1", "a1"]], "chosen": "yes", "rejected": "no"},
            "alpaca",
        ),
        ({"instruction": "q2", "history": [["q1", "a1"]], "output": ["yes", "no"]}, "alpaca"),
        ({"messages": CHOSEN, "rejected_response": "no"}, "openai"),
        ({"messages": CHOSEN, "rejected_messages": REJECTED}, "openai"),
        (
            {"conversations": sharegpt([*PROMPT, ("gpt", "yes")]), "rejected_response": "no"},
            "sharegpt",
        ),
    ],
)
def test_pairs_are_trained_on_behind_what_they_share(row, kind) -> None:
    found, (chosen, rejected) = read(row, task="dpo")
    assert found.kind == kind
    assert spoken(chosen) == [*PROMPT, ("assistant", "yes")]
    assert spoken(rejected) == [*PROMPT, ("assistant", "no")]
    assert chosen.trained == rejected.trained == (3,)


def test_a_system_prompt_is_in_front_of_both_of_ms_swifts_answers() -> None:
    for row in (
        {"messages": CHOSEN, "rejected_response": "no", "system": "s"},
        {"messages": CHOSEN, "rejected_messages": REJECTED, "system": "s"},
    ):
        found, (yes, no) = read(row, "dpo")
        assert spoken(yes) == [("system", "s"), *PROMPT, ("assistant", "yes")]
        assert spoken(no) == [("system", "s"), *PROMPT, ("assistant", "no")]
        assert yes.trained == no.trained == (4,)
        assert found.unknown_keys(row) == set()


def test_a_pairs_system_prompt_is_in_front_of_both() -> None:
    row = {"prompt": "q", "chosen": "yes", "rejected": "no", "system": "s"}
    for chat in read(row, task="dpo")[1]:
        assert spoken(chat)[:2] == [("system", "s"), ("user", "q")]
        assert chat.trained == (2,)


# --- what is no chat ------------------------------------------------------------------------------


def turns(*texts: tuple[str, object]) -> dict:
    return {"messages": openai(texts)}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "is a list, not an object"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": 3}, "'messages' is not a list of turns"),
        ({"text": "t"}, "has no 'messages'; it has 'text'"),
        (turns(("user", "q")), "the assistant says nothing to train on"),
        (turns(("user", "q"), ("assistant", "")), r"turn 2 \(assistant\) is empty"),
        (turns(("user", ""), ("assistant", "a")), r"turn 1 \(user\) is empty"),
        (turns(("user", 3), ("assistant", "a")), "turn 1 is 3, not a string"),
        (turns(("user", [{"image": "x"}]), ("assistant", "a")), "turn 1 holds something other"),
        (turns(("alien", "q"), ("assistant", "a")), "turn 1 of 'messages' is from 'alien'"),
        ({"messages": ["q", "a"]}, "turn 1 of 'messages' has no 'role'"),
        ({**turns(("user", "q"), ("assistant", "a")), "tools": "{"}, "'tools' is not JSON"),
        (turns(("user", "q"), ("function_call", "f")), "the function call in turn 2 is not JSON"),
        (
            {**turns(("system", "s"), ("user", "q"), ("assistant", "a")), "system": "t"},
            "has two system prompts",
        ),
    ],
)
def test_reasons_of_bad_rows(row, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        read(row, kind="openai")


@pytest.mark.parametrize(
    ("row", "task", "reason"),
    [
        ({"text": "t"}, "sft", "chats have 'messages', 'conversations' or 'instruction'"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "sft", "are for --task dpo"),
        ({"instruction": "q", "output": "a"}, "dpo", "--task dpo takes preference pairs"),
    ],
)
def test_what_is_in_no_format(row, task, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        read(row, task=task)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "'rejected' is missing or empty"),
        (
            {
                "chosen": [said("user", "q"), said("assistant", "a")],
                "rejected": [said("user", "p"), said("assistant", "a")],
            },
            "do not part at an answer of the assistant",
        ),
    ],
)
def test_reasons_of_bad_pairs(row, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        read(row, task="dpo", kind="preference")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is no JSON object"),
        ('{"promt": "q"}', "promt means nothing; columns are"),
        ('{"tags": {"rolle": "q"}}', "rolle means nothing"),
    ],
)
def test_faults_of_map_keys(text, message) -> None:
    with pytest.raises(UserError, match=message):
        parse_map_keys(text)


@pytest.mark.parametrize("key", ["weight", "loss", "loss_mask", "train", "training", "trainable"])
@pytest.mark.parametrize("no", [0, False, 0.0])
def test_every_key_that_says_not_this_one_is_obeyed(key: str, no: object) -> None:
    """OpenAI's, ms-swift's, slime's, verl's and axolotl's."""
    turns = [
        said("user", "a"),
        said("assistant", "b", **{key: no}),
        said("user", "c", **{key: no}),
        said("assistant", "d", **{key: 1}),
        said("user", "e", **{key: None}),
        said("assistant", "f"),
    ]
    (chat,) = row_format("openai", "sft", {}).chats({"messages": turns})
    assert chat.trained == (3, 5)
    assert all(key not in message for message in chat.messages)
    from_tags = [{"from": t["role"], "value": t["content"], key: t.get(key)} for t in turns]
    (chat,) = row_format("sharegpt", "sft", {}).chats({"conversations": from_tags})
    assert chat.trained == (3, 5)
    with pytest.raises(ValueError, match=rf"says {key}={no!r} of itself, so it is not trained on"):
        row_format("openai", "sft", {}).chats({"messages": turns, key: no})
    assert row_format("openai", "sft", {}).chats({"messages": turns, key: True})


@pytest.mark.parametrize(
    ("role", "value", "reason"),
    [
        ("assistant", 0.5, r"turn 2 \(assistant\) has loss=0.5; known are 0, 1, false and true"),
        ("assistant", [1, 0], r"has loss=\[1, 0\]; known are"),
        ("assistant", "false", "has loss='false'; known are"),
        ("assistant", 2, "has loss=2; known are"),
        ("user", True, r"turn 2 \(user\) asks to be trained on"),
    ],
)
def test_what_cannot_be_obeyed_of_such_a_key_is_refused(role, value, reason) -> None:
    turns = [said("user", "a"), said(role, "b", loss=value), said("assistant", "c")]
    with pytest.raises(ValueError, match=reason):
        row_format("openai", "sft", {}).chats({"messages": turns})


MESSAGES = [said("user", "q"), said("assistant", "a")]


def test_the_rejected_answer_of_a_chat_needs_a_chosen_one() -> None:
    row = {"messages": [said("user", "q")], "rejected_response": "no"}
    with pytest.raises(ValueError, match="does not end with an answer of the assistant"):
        row_format("openai", "dpo", {}).chats(row)
    answered = {"messages": MESSAGES, "rejected_response": "a"}
    with pytest.raises(ValueError, match="chosen and rejected are the same"):
        row_format("openai", "dpo", {}).chats(answered)
    assert row_format("openai", "sft", {}).unknown_keys(answered) == {"'rejected_response'"}


@pytest.mark.parametrize("key", ["label", "kto_tag"])
def test_a_bad_answer_of_ktos_data_is_not_trained_on(key: str) -> None:
    form = row_format("openai", "sft", {})
    with pytest.raises(ValueError, match=f"says {key}=false of its answer"):
        form.chats({"messages": MESSAGES, key: False})
    for value in (True, 0, "bad", None):
        row = {"messages": MESSAGES, key: value}
        assert len(form.chats(row)) == 1
        assert form.unknown_keys(row) == (set() if value is True else {repr(key)})


@pytest.mark.parametrize("key", ["image", "images", "video", "videos", "audio", "audios"])
def test_what_a_language_model_cannot_see_is_refused(key: str) -> None:
    row = {"messages": [said("user", "<image>q"), said("assistant", "a")], key: ["a.png"]}
    with pytest.raises(ValueError, match=f"has '{key}', which a language model cannot see"):
        row_format("openai", "sft", {}).chats(row)
    assert len(row_format("openai", "sft", {}).chats({**row, key: []})) == 1


def test_openais_older_functions_are_tools() -> None:
    """Their calls are in the messages; without them the model would learn to make them up."""
    function = {"name": "f", "parameters": {"type": "object"}}
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    row = {"messages": [said("user", "q"), call], "functions": [function]}
    form = row_format("openai", "sft", {})
    (chat,) = form.chats(row)
    assert chat.tools == [{"type": "function", "function": function}]
    assert form.unknown_keys(row) == set()


def test_keys_that_mean_nothing_are_found() -> None:
    messages = [
        said("user", "a", mask=1, tool_call_id="x"),
        said("assistant", "b", weight=1, logprobs=[]),
    ]
    row = {"messages": messages, "tools": None, "source": "web", "loss": True}
    found = row_format("openai", "sft", {}).unknown_keys(row)
    assert found == {"'source'", "'mask' of a message", "'logprobs' of a message"}
    row = {"instruction": "a", "output": "b", "score": 1, "history": [["a", "b"]]}
    assert row_format("alpaca", "sft", {}).unknown_keys(row) == {"'score'"}
    row = {"prompt": "a", "chosen": messages[1:], "rejected": "c", "margin": 1}
    found = row_format("preference", "dpo", {}).unknown_keys(row)
    assert found == {"'margin'", "'logprobs' of a message"}
