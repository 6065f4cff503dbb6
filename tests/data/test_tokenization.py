"""What a worker makes of rows: the ids transformers gives, and a reason for every bad row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from corpora import documents, save_tokenizer
from transformers import AutoTokenizer

from commands import run_python
from qwen2_ascend.data.inputs import Row
from qwen2_ascend.data.tokenization import Encoder, load_tokenizer
from qwen2_ascend.errors import UserError


def make_encoder(folder: Path, *, keys=("text",), append_eod: bool = False) -> Encoder:
    spec = load_tokenizer(str(folder), None)
    return Encoder(spec, keys=keys, dtype="uint16", append_eod=append_eod, max_row_bytes=1000)


def text_rows(texts: list[str]) -> list[Row]:
    return [Row("a.txt", i + 1, "text", text.encode()) for i, text in enumerate(texts)]


@pytest.mark.parametrize("append_eod", [False, True])
def test_ids_are_those_of_transformers(append_eod: bool, tokenizer_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    texts = [*documents(50), "special <|endoftext|> inside"]
    encoded = make_encoder(tokenizer_folder, append_eod=append_eod)(text_rows(texts))
    eod = [tokenizer.eos_token_id] if append_eod else []
    expected = [tokenizer(text).input_ids + eod for text in texts]
    assert encoded.lengths["text"].tolist() == list(map(len, expected))
    assert encoded.tokens["text"].tolist() == [token for ids in expected for token in ids]
    assert encoded.tokens["text"].dtype == np.uint16
    assert encoded.bad_rows == []


def test_slow_tokenizers_give_the_same_ids(tokenizer_folder: Path) -> None:
    spec = load_tokenizer(str(tokenizer_folder), None)
    options = dict(keys=("text",), dtype="uint16", append_eod=False, max_row_bytes=1000)
    rows = text_rows(documents(20))
    fast, slow = Encoder(spec, **options), Encoder(spec._replace(backend=None), **options)
    assert slow(rows).tokens["text"].tolist() == fast(rows).tokens["text"].tolist()


BAD_ROWS = {
    b"not json": "not JSON: Expecting value at column 1",
    b'{"text": "a"': "not JSON: Expecting ',' delimiter at column 13",
    b"[1, 2]": "is JSON but a list, not an object",
    b'{"body": "a", "id": 3}': "has no key 'text'; its keys are 'body', 'id'",
    b'{"text": null}': "'text' is null, not a string",
    b'{"text": 3}': "'text' is int, not a string",
    b'{"text": ""}': "'text' is empty",
    b'{"text": "\xff"}': "not UTF-8: byte 0xff at byte 11",
    b'{"text": "\\ud800"}': "'text' holds half of a surrogate pair, which is no character",
    b"[" * 100_000: "not JSON: nested too deeply",
}


@pytest.mark.parametrize("raw", BAD_ROWS)
def test_bad_rows_are_left_out_with_a_reason(raw: bytes, tokenizer_folder: Path) -> None:
    good = b'{"text": "good"}'
    rows = [Row("a.jsonl", i + 1, "jsonl", data) for i, data in enumerate((good, raw, good))]
    encoded = make_encoder(tokenizer_folder, append_eod=True)(rows)
    assert encoded.bad_rows == [("a.jsonl:2", BAD_ROWS[raw])]
    assert encoded.lengths["text"].size == 2


def test_too_long_and_empty_files_are_bad_rows(tokenizer_folder: Path) -> None:
    rows = [Row("a", 0, "text", None), Row("b", 0, "text", b""), Row("c", 0, "text", b"\xff")]
    assert make_encoder(tokenizer_folder)(rows).bad_rows == [
        ("a", "longer than --max-document-bytes 1000; split it, or raise that"),
        ("b", "is empty"),
        ("c", "not UTF-8: byte 0xff at byte 1"),
    ]


def test_a_row_bad_in_one_key_is_left_out_of_all(tokenizer_folder: Path) -> None:
    raws = [b'{"a": "x", "b": "y"}', b'{"a": "x", "b": ""}', b'{"a": "xx", "b": "yy"}']
    rows = [Row("f", i + 1, "jsonl", raw) for i, raw in enumerate(raws)]
    encoded = make_encoder(tokenizer_folder, keys=("a", "b"))(rows)
    assert encoded.lengths["a"].size == encoded.lengths["b"].size == 2
    assert encoded.bad_rows == [("f:2", "'b' is empty")]


def test_the_end_of_document_token_can_be_named(tmp_path: Path) -> None:
    folder = str(save_tokenizer(tmp_path / "t", eos_token="<|im_end|>"))
    assert load_tokenizer(folder, None)[-2:] == ("<|im_end|>", 2)
    assert load_tokenizer(folder, "<|endoftext|>")[-2:] == ("<|endoftext|>", 0)
    with pytest.raises(UserError, match="has no such token"):
        load_tokenizer(folder, "<eod>")


def test_no_tokenizer_there_is_said_without_asking_the_network(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(str(tmp_path / "nothing"), None)
    with pytest.raises(UserError, match="no tokenizer can be read from it"):
        load_tokenizer(str(tmp_path), None)


def test_workers_do_without_torch_and_transformers() -> None:
    """Property: dozens of workers fit into memory, for each holds only a tokenizer."""
    code = (
        "import sys, qwen2_ascend.data.tokenization, tokenizers\n"
        "print([m for m in ('torch', 'transformers', 'megatron') if m in sys.modules])"
    )
    assert run_python("-c", code).out == "[]\n"
