"""Documents that see only themselves: where they end in a sample, their positions and losses."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import write_documents, write_indexed

from qwen2_ascend.data.documents import DocumentRows
from qwen2_ascend.data.pretraining import PretrainingDatasetBuilder
from qwen2_ascend.data.sampler import BATCH_KEYS, build_data_iterator
from qwen2_ascend.errors import UserError

LENGTHS = [1, 30, 2, 16, 17, 5, 48, 3, 16, 15] * 3
"""Tokens of each document: shorter than a sample, as long, and longer."""
S = 16


def write_without_eod(prefix: Path, lengths: list[int]) -> Path:
    """Document i holds 1 + i over and over, and no token says where it ends."""
    return write_documents(prefix, ([1 + i] * length for i, length in enumerate(lengths)))


def build(tmp_path: Path, *words: str, eod_token: int | None = 0, **settings: Any) -> DocumentRows:
    settings = {"num_samples": (40, 0, 0), "vocab_size": 256, **settings}
    builder = PretrainingDatasetBuilder(
        seq_length=S,
        seed=3,
        eod_token=eod_token,
        train_data_path=words,
        data_cache_path=tmp_path,
        keep_documents_apart=True,
        **settings,
    )
    return builder.build().train


def parts(sample: dict[str, Any], key: str) -> list[list[int]]:
    """What each document of a sample has of `key`."""
    return [sample[key][start:end].tolist() for start, end in pairwise((0, *sample["ends"]))]


def test_documents_end_after_their_end_token(tmp_path: Path) -> None:
    data = build(tmp_path, str(write_indexed(tmp_path / "A", LENGTHS)))
    several = 0
    for sample in map(data.__getitem__, range(len(data))):
        tokens, positions = parts(sample, "tokens"), parts(sample, "position_ids")
        several += len(tokens) > 1
        for document, places in zip(tokens, positions, strict=True):
            assert len({*document} - {0}) <= 1, "one document"
            assert 0 not in document[:-1]
            assert places == list(range(len(document)))
        assert all(document[-1] == 0 for document in tokens[:-1])
        assert sample["loss_mask"].tolist() == [1.0] * S, "as in Megatron-LM"
    assert several > len(data) / 2


def test_documents_without_an_end_token_end_where_the_data_says(tmp_path: Path) -> None:
    """Their last token has no loss: it would have to know which document comes next."""
    data = build(tmp_path, str(write_without_eod(tmp_path / "A", LENGTHS)), eod_token=None)
    masked = 0
    for sample in map(data.__getitem__, range(len(data))):
        tokens, labels = sample["tokens"], sample["labels"]
        assert all(len({*document}) == 1 for document in parts(sample, "tokens"))
        changes = (tokens[1:] != tokens[:-1]).nonzero().flatten() + 1
        assert sample["ends"] == (*changes.tolist(), S)
        assert torch.equal(sample["loss_mask"], (tokens == labels).float())
        masked += int((tokens != labels).sum())
    assert masked > len(data) / 2


def test_an_end_token_inside_of_a_document_ends_it_too(tmp_path: Path) -> None:
    """Megatron-LM knows the token alone: texts may have been joined before."""
    write_documents(tmp_path / "joined", [[5, 5, 5, 0, 6, 6, 6, 6]] * 20)
    data = build(tmp_path, f"{tmp_path}/joined", num_samples=(8, 0, 0))
    found = {tuple(part) for i in range(8) for part in parts(data[i], "tokens")}
    assert found == {(5, 5, 5, 0), (6, 6, 6, 6)}


def test_blends_know_their_documents(tmp_path: Path) -> None:
    one, other = (str(tmp_path / name) for name in ("A", "B"))
    write_without_eod(Path(one), LENGTHS)
    write_indexed(Path(other), LENGTHS, first=101)
    data = build(tmp_path, "0.5", one, "0.5", other)
    seen = set()
    for sample in map(data.__getitem__, range(len(data))):
        assert all(len({*document} - {0}) <= 1 for document in parts(sample, "tokens"))
        seen.add(int(sample["tokens"].max()) > 100)
    assert seen == {True, False}


def test_empty_documents_are_none(tmp_path: Path) -> None:
    lengths = [0, 5, 0, 0, 20, 0, 7, 0]
    data = build(tmp_path, str(write_without_eod(tmp_path / "A", lengths)), num_samples=(9, 0, 0))
    for sample in map(data.__getitem__, range(9)):
        assert all(len({*document}) == 1 for document in parts(sample, "tokens"))


def test_a_batch_counts_ends_over_its_rows(tmp_path: Path) -> None:
    data = build(tmp_path, str(write_indexed(tmp_path / "A", LENGTHS)))
    batch: dict[str, Any] = next(build_data_iterator(data, 4, 3, 0, 1))
    assert {key: tuple(batch[key].shape) for key in BATCH_KEYS} == dict.fromkeys(BATCH_KEYS, (3, S))
    rows = [data[4 + i]["ends"] for i in range(3)]
    assert batch["ends"] == tuple(S * i + end for i, row in enumerate(rows) for end in row)
    starts = (batch["position_ids"].flatten() == 0).nonzero().flatten().tolist()
    assert starts == [0, *batch["ends"][:-1]]


def test_tokens_beyond_the_vocabulary_are_found_in_them_too(tmp_path: Path) -> None:
    data = build(tmp_path, str(write_indexed(tmp_path / "A", LENGTHS)))
    data.vocab_size = 3
    with pytest.raises(UserError, match="a batch of the data"):
        list(build_data_iterator(data, 0, 4, 0, 1))
