"""MindSpeed-LLM's `preprocess_data.py` lines run here, and what they write is what theirs would be.

The expected tokens come from a second writing of its rules, in this file: a chat is a list of
texts, each tokenized by itself, and the loss is on the answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from data import corpora
from data.chats import save_chat_tokenizer, write_rows
from pasted.command_lines import CommandLine, command_lines
from qwen2_ascend.cli import main
from qwen2_ascend.data.chat.stored import StoredChats
from qwen2_ascend.data.pasted import PREPROCESS_FLAGS, split_flags
from qwen2_ascend.errors import UserError

LINES = command_lines("preprocess")
ROWS = [
    {
        "instruction": f"what is {i} of 日本",
        "input": "" if i % 2 else "and\nthe",
        "output": f"  it was {i}\n",
        "text": f"the of and to in a {i}",
        "history": [["is that", "it was"], ["for as", "with his"]] if i % 3 == 0 else [],
        "system": "Be brief" if i % 4 == 0 else "",
    }
    for i in range(12)
]
ENDS = {"qwen": "<|im_end|>", "default": "<|endoftext|>", "deepseek3": "<|endoftext|>", "empty": ""}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def base_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its eos_token is <|endoftext|>, as that of Qwen's base models."""
    return corpora.save_tokenizer(tmp_path_factory.mktemp("base_tokenizer"))


def preprocess(prefix: Path, source: Path, tokenizer: Path, flags: str) -> None:
    words = f"--input {source} --tokenizer-name-or-path {tokenizer} --output-prefix {prefix} "
    assert main(["preprocess", *words.split(), *f"--workers 1 {flags}".split()]) == 0


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("dataset") / "train-00000-of-00001.parquet", ROWS)


def stored(prefix: Path, key: str) -> list[list[int]]:
    return [row.tolist() for row in corpora.stored(f"{prefix}_{key}_document")]


def elements(name: str, row: dict[str, Any]) -> list[tuple[str, bool]]:
    """The texts of a chat and whether the loss is on each, by MindSpeed-LLM's rules of a type."""
    question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
    turns = [*row["history"], [question, row["output"]]]
    system = row["system"]
    found: list[tuple[str, bool]] = []
    if name == "qwen":
        system = system or "You are a helpful assistant."
        found.append((f"<|im_start|>system\n{system}<|im_end|>\n", False))
    elif system:
        found.append((system + ("\n" if name == "default" else ""), False))
    for number, (asked, answered) in enumerate(turns):
        if number and name in ("qwen", "default"):
            found.append(("\n", False))
        user = {
            "qwen": f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n",
            "default": f"Human: {asked}\nAssistant:",
            "deepseek3": f"<｜User｜>{asked}<｜Assistant｜>",  # noqa: RUF001
            "empty": asked,
        }[name]
        found += [(user, False), (answered, True), (ENDS[name], True)]
    return [(text, trained) for text, trained in found if text]


def expected(folder: Path, name: str) -> tuple[list[list[int]], list[list[int]]]:
    """The ids and labels of all rows."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids, labels = [], []
    for row in ROWS:
        pieces = [
            (tokenizer.encode(text, add_special_tokens=False), trained)
            for text, trained in elements(name, row)
        ]
        ids.append([i for piece, _ in pieces for i in piece])
        labels.append([i if trained else -100 for piece, trained in pieces for i in piece])
    return ids, labels


@pytest.mark.parametrize("line", LINES, ids=[line.name for line in LINES])
def test_every_line_runs(line: CommandLine, tokenizer: Path, parquet: Path, tmp_path: Path) -> None:
    """Nothing is changed but the program's name and the paths."""
    paths = {
        "--input": parquet,
        "--tokenizer-name-or-path": tokenizer,
        "--output-prefix": tmp_path / "alpaca",
    }
    assert main(["preprocess", *line.with_paths(paths)]) == 0
    if "--handler-name" not in line.flags or "GeneralPretrainHandler" in line.flags:
        loaded: Any = AutoTokenizer.from_pretrained(tokenizer)
        texts = [loaded(row["text"]).input_ids for row in ROWS]
        assert stored(tmp_path / "alpaca", "text") == texts
        return
    ids, labels = expected(tokenizer, "qwen")
    if "--pack" in line.flags:
        _check_packs(tmp_path / "alpaca", int(line.values("--seq-length")[0]), ids, labels)
        return
    assert stored(tmp_path / "alpaca", "packed_input_ids") == ids
    assert stored(tmp_path / "alpaca", "packed_labels") == labels
    assert stored(tmp_path / "alpaca", "packed_attention_mask") == [[1] * len(row) for row in ids]


def _check_packs(prefix: Path, length: int, ids: Any, labels: Any) -> None:
    """Checks --neat-pack: every chat is there once, numbered from 1, and padding has mask 0."""
    found = []
    kinds = ("packed_input_ids", "packed_labels", "packed_attention_mask")
    for row in zip(*(stored(prefix, kind) for kind in kinds), strict=True):
        pack_ids, pack_labels, mask = map(np.array, row)
        assert len(pack_ids) == length and (pack_labels[mask == 0] == -100).all()
        for number in range(1, mask.max() + 1):
            found.append((pack_ids[mask == number].tolist(), pack_labels[mask == number].tolist()))
    assert sorted(found) == sorted(zip(ids, labels, strict=True))


@pytest.mark.parametrize("name", ["default", "deepseek3", "empty"])
def test_tokens_of_other_prompt_types(
    name: str, base_tokenizer: Path, parquet: Path, tmp_path: Path
) -> None:
    """Their texts join without a special token between, and still are cut where theirs are."""
    flags = f"""--handler-name AlpacaStyleInstructionHandler --tokenizer-type PretrainedFromHF
        --log-interval 1000 --overwrite-cache --prompt-type {name}"""
    preprocess(tmp_path / "alpaca", parquet, base_tokenizer, flags)
    ids, labels = expected(base_tokenizer, name)
    assert stored(tmp_path / "alpaca", "packed_input_ids") == ids
    assert stored(tmp_path / "alpaca", "packed_labels") == labels


def test_pairs_by_the_handlers_name(tokenizer: Path, tmp_path: Path) -> None:
    rows = [{"instruction": "what", "input": "", "chosen": "the of", "rejected": "with his"}]
    flags = "--prompt-type qwen --handler-name AlpacaStylePairwiseHandler --seq-length 4096"
    path = write_rows(tmp_path / "pairs.json", rows)
    preprocess(tmp_path / "dpo", path, tokenizer, flags)
    loaded: Any = AutoTokenizer.from_pretrained(tokenizer)
    for side in ("chosen", "rejected"):
        (ids,) = stored(tmp_path / "dpo", f"packed_{side}_input_ids")
        assert loaded.decode(ids) == (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nwhat"
            f"<|im_end|>\n<|im_start|>assistant\n{rows[0][side]}<|im_end|>"
        )


def test_pack_alone_lets_the_chats_of_a_pack_see_one_another(
    tokenizer: Path, parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There the mask is 1 everywhere, so training takes a pack for one text."""
    flags = "--handler-name AlpacaStyleInstructionHandler --prompt-type qwen --seq-length 400"
    preprocess(tmp_path / "a", parquet, tokenizer, f"{flags} --pack")
    masks = stored(tmp_path / "a", "packed_attention_mask")
    assert masks and all(mask == [1] * 400 for mask in masks)
    assert "chats of a pack see one another; --neat-pack parts them" in capsys.readouterr().out
    assert {len(StoredChats([tmp_path / "a"]).chats(i, 400)) for i in range(len(masks))} == {1}
    flat = [i for row in stored(tmp_path / "a", "packed_labels") for i in row if i != -100]
    assert sorted(flat) == sorted(
        i for row in expected(tokenizer, "qwen")[1] for i in row if i != -100
    )


@pytest.mark.parametrize("flag", [flag for flag in PREPROCESS_FLAGS if flag != "--cache-dir"])
def test_every_pasted_flag_is_said_or_refused(
    flag: str, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meaning = PREPROCESS_FLAGS[flag]
    value = [] if meaning.values == () else [(meaning.values or ("7",))[0]]
    path = write_rows(tmp_path / "a.jsonl", [{"text": "the of"}])
    words = f"--input {path} --tokenizer-name-or-path {tokenizer} --output-prefix {tmp_path / 'a'}"
    status = main(["preprocess", *words.split(), "--workers", "1", flag, *value])
    told = capsys.readouterr()
    assert status == (2 if meaning.refused else 0)
    assert f"{' '.join([flag, *value])}" in (told.err if meaning.refused else told.out)
    assert meaning.says in " ".join((told.err + told.out).split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--handler-name MOSSInstructionHandler", "--handler-name MOSSInstructionHandler is not"),
        ("--handler-name=PPOAlpacaStyleInstructionHandler", "one of GeneralPretrainHandler"),
    ],
)
def test_handlers_of_other_data_are_refused(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        split_flags(words.split())


def test_prompt_type_and_template_exclude_each_other(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"""--task sft --input a.jsonl --tokenizer-name-or-path {tokenizer}
        --output-prefix {tmp_path / "a"} --prompt-type qwen --chat-template t.jinja"""
    assert main(["preprocess", *words.split()]) == 2
    assert "--prompt-type qwen and --chat-template t.jinja" in capsys.readouterr().err
