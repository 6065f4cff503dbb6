"""A token that the model does not have never reaches it, however rare it is and wherever from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from chats import said, save_chat_tokenizer, write_rows
from corpora import save_tokenizer, write_indexed, write_jsonl

from qwen2_ascend.cli import main
from qwen2_ascend.data.chat.build import ChatDatasetBuilder
from qwen2_ascend.data.indexed import largest_token, open_indexed
from qwen2_ascend.data.pretraining import PretrainingDatasetBuilder
from qwen2_ascend.data.sampler import build_data_iterator
from qwen2_ascend.errors import UserError
from qwen2_ascend.vocabulary import check_tokens, unknown_tokens


def high_token(folder: Path, token_id: int) -> Path:
    """Gives the tokenizer in `folder` a token far above the others."""
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["model"]["vocab"]["Ġzq"] = token_id
    raw["model"]["vocab"] |= {"zq": len(raw["model"]["vocab"]) + 50}
    raw["model"]["merges"] += [["z", "q"], ["Ġ", "zq"]]
    path.write_text(json.dumps(raw))
    return folder


def prepared(folder: Path, tokenizer: Path, texts: list[str]) -> str:
    """The prefix of texts that `preprocess` has prepared."""
    write_jsonl(folder / "a.jsonl", texts)
    words = ["preprocess", "--input", folder / "a.jsonl", "--output-prefix", folder / "a"]
    words += ["--tokenizer-name-or-path", tokenizer, "--workers", 1]
    assert main(list(map(str, words))) == 0
    return f"{folder}/a_text_document"


@pytest.mark.parametrize(("token_id", "dtype"), [(60000, np.uint16), (70000, np.int32)])
def test_the_width_of_the_file_follows_the_largest_id(tmp_path: Path, token_id, dtype) -> None:
    """A trimmed vocabulary has few entries and a hole in its ids."""
    folder = high_token(save_tokenizer(tmp_path / "hf"), token_id)
    prefix = prepared(tmp_path, folder, ["the zq of", "and"])
    stored = open_indexed(prefix)
    assert token_id in np.array(stored[0]).tolist()
    assert stored.index.dtype == dtype
    assert largest_token(prefix) == token_id


def test_prepared_text_carries_its_largest_token(tmp_path: Path) -> None:
    """It is in one of 5,000 documents: no sample of them would see it."""
    folder = high_token(save_tokenizer(tmp_path / "hf"), 500)
    texts = ["the of and to"] * 5000
    texts[4001] = "the zq"
    data_path = [prepared(tmp_path, folder, texts)]
    settings = dict(num_samples=(20, 0, 0), seq_length=16, seed=1, eod_token=0, split="1,0,0")
    with pytest.raises(UserError, match="holds token 500, the model's vocabulary ends at 499"):
        PretrainingDatasetBuilder(data_path=data_path, vocab_size=500, **settings).build()


def test_prepared_chats_carry_their_largest_token(tmp_path: Path) -> None:
    folder = high_token(save_chat_tokenizer(tmp_path / "hf"), 500)
    rows = [{"messages": [said("user", "the of"), said("assistant", "and")]} for _ in range(400)]
    rows[8]["messages"][1]["content"] = "the zq"
    path = write_rows(tmp_path / "c.jsonl", rows)
    with pytest.raises(UserError, match="holds token 500, the model's vocabulary ends at 499"):
        ChatDatasetBuilder(
            data_path=[str(path)], tokenizer=folder, seq_length=64, seed=1, vocab_size=500
        ).build()


def test_text_prepared_elsewhere_is_looked_at_batch_by_batch(tmp_path: Path) -> None:
    """Megatron's and MindSpeed-LLM's files do not say what their largest token is."""
    prefix = write_indexed(tmp_path / "A", [9] * 300)
    settings = dict(
        num_samples=(280, 0, 0), seq_length=8, seed=1, eod_token=0, split="1,0,0", vocab_size=299
    )
    (train, *_) = PretrainingDatasetBuilder(data_path=[str(prefix)], **settings).build()
    with pytest.raises(UserError, match=r"a batch of the data holds token (299|300), the model's"):
        list(build_data_iterator(train, 0, 4, 0, 1))
    settings["vocab_size"] = 301
    (train, *_) = PretrainingDatasetBuilder(data_path=[str(prefix)], **settings).build()
    assert len(list(build_data_iterator(train, 0, 4, 0, 1))) >= 70


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_is_refused_in_words_also_with_readers(tmp_path: Path, workers: int) -> None:
    class Two:
        vocab_size = 7

        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> dict:
            row = torch.full((4,), index)
            return {"tokens": row, "labels": row, "loss_mask": row, "position_ids": row}

    batches = build_data_iterator(Two(), 0, 2, 0, 1, num_workers=workers)
    assert len([next(batches) for _ in range(3)]) == 3
    with pytest.raises(UserError, match=r"^a batch of the data holds token 7, the model's"):
        next(batches)


def test_padding_is_a_token_that_the_model_has(tmp_path: Path) -> None:
    folder = save_chat_tokenizer(tmp_path / "hf")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["added_tokens"].append({**raw["added_tokens"][0], "content": "<pad>", "id": 900})
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "<pad>"}))
    rows = [{"messages": [said("user", "the of"), said("assistant", "and")]} for _ in range(4)]
    path = write_rows(tmp_path / "c.jsonl", rows)
    found = ChatDatasetBuilder(
        data_path=[str(path)], tokenizer=folder, seq_length=64, seed=1, vocab_size=400
    ).build()
    assert len(list(build_data_iterator(found.train, 0, 2, 0, 1))) == 2


def test_unknown_tokens_are_named() -> None:
    assert unknown_tokens([], 5) == unknown_tokens([0, 4], 5) == ""
    assert "holds token 9, the model's vocabulary ends at 4" in unknown_tokens([0, 9], 5)
    with pytest.raises(UserError, match=r"the text holds token -1"):
        check_tokens([3, -1], 5)
