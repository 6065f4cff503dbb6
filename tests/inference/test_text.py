"""Streamed pieces add up to the text, never show half a character, and end at a stop string."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.corpora import save_tokenizer
from qwen2_ascend.inference.text import UNFINISHED, TextStream


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def decoder(tokenizer: Any) -> Any:
    return lambda ids: tokenizer.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_pieces_add_up_to_the_text(tokenizer: Any, text: str) -> None:
    stream = TextStream(decoder(tokenizer))
    ids = tokenizer(text).input_ids
    pieces = [stream.add(token) for token in ids]
    pieces.append(stream.end())
    assert "".join(pieces) == text == stream.text
    if UNFINISHED not in text:
        assert not any(UNFINISHED in piece for piece in pieces)


def test_a_character_comes_when_its_last_byte_does(tokenizer: Any) -> None:
    stream = TextStream(decoder(tokenizer))
    pieces = [stream.add(token) for token in tokenizer("a🤖b").input_ids]
    assert [piece for piece in pieces if piece] == ["a", "🤖", "b"]
    assert len(pieces) > 3, "the tokenizer knows the character as one token"


def test_bytes_that_make_no_character_are_given_in_the_end(tokenizer: Any) -> None:
    stream = TextStream(decoder(tokenizer))
    first_byte = tokenizer("🤖").input_ids[0]
    pieces = [stream.add(first_byte) for _ in range(40)]
    assert any(pieces)
    stream.end()
    assert stream.text == UNFINISHED * 40


@settings(max_examples=200, deadline=None)
@given(text=st.text("abc\n日", max_size=30), stops=st.lists(st.text("abc\n日", max_size=4)))
def test_the_text_ends_before_the_stop_string_that_is_complete_first(
    tokenizer: Any, text: str, stops: list[str]
) -> None:
    """Over token borders too, and nothing of the stop string is shown before."""
    stream = TextStream(decoder(tokenizer), stops)
    shown = ""
    for token in tokenizer(text).input_ids:
        shown += stream.add(token)
        assert text.startswith(shown)
        if stream.stopped is not None:
            break
    shown += stream.end()
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    found = [(end, place) for end, place in found if end > place]
    assert (stream.stopped is not None) == bool(found)
    assert shown == stream.text == (text[: min(found)[1]] if found else text)


def test_what_may_become_a_stop_string_is_held_back() -> None:
    stream = TextStream(lambda ids: "".join(map(chr, ids)), ["\nUser:"])
    assert "".join(map(stream.add, b"Hello\nUs")) == "Hello"
    assert stream.add(ord("a")) == "\nUsa"
    assert "".join(map(stream.add, b"ge\nUser")) == "ge"
    assert stream.stopped is None
    assert stream.add(ord(":")) == ""
    assert stream.stopped == "\nUser:"
    assert stream.text == "Hello\nUsage"


SPECIAL = {1000: "<|end|>", 1001: "<|a|>"}


def shown(tokens: list[int], stop: list[str]) -> tuple[str, str | None]:
    def decode(ids: list[int]) -> str:
        return "".join(chr(i) for i in ids if i < 1000)

    stream = TextStream(decode, stop, SPECIAL)
    pieces = []
    for token in tokens:
        pieces.append(stream.add(token))
        if stream.stopped is not None:
            break
    pieces.append(stream.end())
    assert "".join(pieces) == stream.text
    return stream.text, stream.stopped


@pytest.mark.parametrize(
    ("stop", "text", "stopped"),
    [
        (["<|end|>"], "abc", "<|end|>"),
        (["c<|end|>x"], "ab", "c<|end|>x"),
        (["nd|>"], "abc", "nd|>"),
        (["<|end|><|end|>"], "abcxyz", None),
        (["<|a|>", "z"], "abcxy", "z"),
        (["xy"], "abc", "xy"),
        ([], "abcxyz", None),
    ],
)
def test_stop_strings_see_special_tokens_which_the_text_does_not_hold(stop, text, stopped) -> None:
    tokens = [*map(ord, "abc"), 1000, *map(ord, "xyz")]
    assert shown(tokens, stop) == (text, stopped)


def test_special_tokens_cut_no_other_text(tokenizer: Any) -> None:
    """Half a character before a special token is no character."""
    ids = tokenizer("a🤖").input_ids
    special = {2: "<|im_end|>"}
    stream = TextStream(decoder(tokenizer), ["never"], special)
    for token in [*ids[:-1], 2, *tokenizer("b").input_ids]:
        stream.add(token)
    stream.end()
    assert stream.text.replace(UNFINISHED, "") == "ab"
