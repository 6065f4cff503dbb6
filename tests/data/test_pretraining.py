"""Pretraining datasets: blends and splits are what was asked for, in Megatron's order."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpora import documents, save_tokenizer, write_indexed, write_jsonl
from transformers import AutoTokenizer

from qwen2_ascend.data.blends import parse_blend
from qwen2_ascend.data.command import main
from qwen2_ascend.data.indexed import IndexedDatasetBuilder, fingerprint, open_indexed
from qwen2_ascend.data.pretraining import PretrainingDatasetBuilder, is_repeated
from qwen2_ascend.data.sampler import BATCH_KEYS, build_data_iterator
from qwen2_ascend.errors import UserError

LENGTHS = np.random.default_rng(3).integers(5, 60, 200).tolist()
"""Tokens of each document, in both datasets."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets A (tokens 1 to 200) and B (tokens 1001 to 1200); 0 ends a document."""
    folder = tmp_path_factory.mktemp("indexed")
    write_indexed(folder / "A", LENGTHS)
    write_indexed(folder / "B", LENGTHS, first=1001, dtype=np.int32)
    return folder


@pytest.fixture(autouse=True)
def _in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def build(*data_path: str, cache: Path | None = None, **settings):
    settings = {
        "num_samples": (100, 20, 0),
        "seq_length": 16,
        "seed": 1234,
        "eod_token": 0,
        "split": "80,15,5",
        "data_path": data_path or None,
        "data_cache_path": cache,
        **settings,
    }
    return PretrainingDatasetBuilder(**settings).build()


def documents_in(dataset) -> set[int]:
    """Numbers of the documents that a dataset's samples are from."""
    return {int(t) for i in range(len(dataset)) for t in dataset[i]["tokens"]} - {0}


def test_samples_are_what_the_model_trains_on(tmp_path: Path) -> None:
    train = build("A", cache=tmp_path).train
    sample = train[0]
    assert {key: (v.dtype, tuple(v.shape)) for key, v in sample.items()} == {
        "tokens": (torch.int64, (16,)),
        "labels": (torch.int64, (16,)),
        "loss_mask": (torch.float32, (16,)),
        "position_ids": (torch.int64, (16,)),
    }
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
    assert sample["loss_mask"].tolist() == [1.0] * 16
    assert sample["position_ids"].tolist() == list(range(16))


@pytest.mark.parametrize("path", [("A",), ("0.5", "A", "0.5", "B")], ids=["one", "blend"])
@pytest.mark.parametrize("apart", [False, True])
def test_the_order_depends_on_the_length_beyond_an_epoch(
    path: tuple[str, ...], apart: bool, tmp_path: Path
) -> None:
    """Property: what `is_repeated` says no to leaves the first samples where they were."""

    def first(num_samples: int) -> tuple[Any, list[list[int]]]:
        sizes = {"num_samples": (num_samples, 0, 0), "keep_documents_apart": apart}
        data = build(*path, cache=tmp_path, **sizes).train
        return data, [data[index]["tokens"].tolist() for index in range(50)]

    short, order = first(100)
    longer, kept = first(250)
    beyond, other = first(1600)
    assert not is_repeated(short, 2.5) and not is_repeated(longer, 1) and kept == order
    assert is_repeated(short, 16) and is_repeated(beyond, 1) and other != order


def test_splits_do_not_overlap(tmp_path: Path) -> None:
    """Property: no document is in two splits, and each split is in its place of the file."""
    sizes = (1000, 150, 40)
    train, valid, test = (documents_in(d) for d in build("A", cache=tmp_path, num_samples=sizes))
    assert max(train) <= 160 < min(valid)
    assert max(valid) <= 190 < min(test)
    assert train | valid | test == set(range(1, 201))


def test_a_split_that_nobody_wants_is_not_built(tmp_path: Path) -> None:
    datasets = build("A", cache=tmp_path, num_samples=(10, 0, 0), split="100,0,0")
    assert datasets.train is not None
    assert datasets.valid is None
    assert datasets.test is None


@pytest.mark.parametrize("weights", [("0.3", "0.7"), ("3", "7"), ("1", "9")])
def test_blends_draw_in_proportion(weights: tuple[str, str], tmp_path: Path) -> None:
    a, b = weights
    train = build(a, "A", b, "B", cache=tmp_path, num_samples=(1000, 0, 0)).train
    share = np.mean([int(train[i]["tokens"].max()) <= 200 for i in range(1000)])
    assert share == pytest.approx(float(a) / (float(a) + float(b)), abs=0.002)
    # and at any moment, not only at the end
    first = np.mean([int(train[i]["tokens"].max()) <= 200 for i in range(50)])
    assert first == pytest.approx(float(a) / (float(a) + float(b)), abs=0.03)


def test_datasets_without_weights_last_one_epoch(tmp_path: Path) -> None:
    train = build("A", "B", cache=tmp_path, num_samples=(100, 0, 0)).train
    shares = [int(train[i]["tokens"].max()) <= 200 for i in range(100)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.02)
    with pytest.raises(UserError, match="train: a blend without weights lasts one epoch"):
        build("A", "B", cache=tmp_path, num_samples=(5000, 0, 0))


def test_each_split_can_have_its_own_data(tmp_path: Path) -> None:
    datasets = build(
        train_data_path=["A"], valid_data_path=["B"], num_samples=(600, 300, 0), cache=tmp_path
    )
    assert documents_in(datasets.train) == set(range(1, 201))
    assert documents_in(datasets.valid) <= set(range(1001, 1201))
    blended = build(
        train_data_path=["0.5", "A", "0.5", "B"], num_samples=(50, 0, 0), cache=tmp_path
    )
    assert {t > 1000 for t in documents_in(blended.train)} == {True, False}


def test_order_is_that_of_megatrons_own_builder(tmp_path: Path) -> None:
    """A run moved here from Megatron-LM goes on with the samples it would have seen there."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import get_blend_from_list

    from qwen2_ascend.data.pretraining import EodTokenizer

    words = ["0.4", "A", "0.6", "B"]
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=16,
        blend=get_blend_from_list(words),
        split="80,15,5",
        tokenizer=EodTokenizer(0, None, {}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    theirs = BlendedMegatronDatasetBuilder(GPTDataset, [300, 40, 10], lambda: True, config).build()
    ours = build(*words, num_samples=(300, 40, 10), cache=tmp_path)
    for split, expected in zip(ours, theirs, strict=True):
        assert len(split) == len(expected)
        for i in range(len(split)):
            assert torch.equal(split[i]["tokens"], expected[i]["tokens"])


def test_a_resume_at_another_data_parallel_size_reads_on(tmp_path: Path) -> None:
    """Global batches of 8: four steps on 4 ranks, then 2 ranks with another micro-batch; together
    they are the batches of one rank that never stopped."""
    train = build("0.3", "A", "0.7", "B", cache=tmp_path, num_samples=(80, 0, 0)).train

    def steps(consumed: int, size: int, b: int):
        ranks = [build_data_iterator(train, consumed, b, rank, size) for rank in range(size)]
        while True:
            micro = [next(rank) for _ in range(8 // (b * size)) for rank in ranks]
            yield torch.cat([batch["tokens"] for batch in micro]).tolist()

    whole = list(islice(steps(0, 1, 8), 10))
    first = list(islice(steps(0, 4, 2), 4))
    rest = list(islice(steps(32, 2, 1), 6))
    assert [sorted(batch) for batch in first + rest] == [sorted(batch) for batch in whole]


def test_the_loss_at_the_end_of_a_document_is_left_out_when_asked(tmp_path: Path) -> None:
    train = build("A", cache=tmp_path, eod_mask_loss=True).train
    samples = [train[i] for i in range(len(train))]
    assert any(0 in sample["tokens"] for sample in samples)
    for sample in samples:
        assert torch.equal(sample["loss_mask"], (sample["tokens"] != 0).float())


def test_several_epochs_repeat_the_data(tmp_path: Path) -> None:
    train = build("A", cache=tmp_path, num_samples=(3000, 0, 0)).train
    assert len(train) >= 3000
    assert documents_in(train) == set(range(1, 161))


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_files_in_megatrons_style_are_read(dtype, tmp_path: Path) -> None:
    """Megatron-LM adds whole documents, also of several sequences; MindSpeed-LLM adds items and
    ends the document after each."""
    builder = IndexedDatasetBuilder(str(tmp_path / "lm.bin"), dtype=dtype)
    for _ in range(50):
        builder.add_document([7, 7, 7, 8, 8, 0], [3, 3])
    builder.finalize(str(tmp_path / "lm.idx"))
    builder = IndexedDatasetBuilder(str(tmp_path / "llm.bin"), dtype=dtype)
    for _ in range(50):
        builder.add_item(torch.tensor([9, 9, 9, 9, 0], dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(tmp_path / "llm.idx"))
    prefixes = ["0.5", str(tmp_path / "lm"), "0.5", str(tmp_path / "llm")]
    train = build(*prefixes, num_samples=(40, 0, 0), cache=tmp_path).train
    assert documents_in(train) == {7, 8, 9}


def test_what_preprocess_writes_is_read(tmp_path: Path) -> None:
    texts = documents(60)
    write_jsonl(tmp_path / "a.jsonl", texts)
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    words = f"--input {tmp_path}/a.jsonl --output-prefix {tmp_path}/a --append-eod --workers 1"
    main([*words.split(), "--tokenizer-name-or-path", str(tokenizer)])
    train = build(f"{tmp_path}/a_text_document", cache=tmp_path, vocab_size=403).train
    decode = AutoTokenizer.from_pretrained(tokenizer).decode
    pieces = decode(train[0]["tokens"]).split("<|endoftext|>")
    assert all(any(piece in text for text in texts) for piece in pieces)


def test_the_cache_is_used_and_known_to_be_stale(tmp_path: Path) -> None:
    """Preprocessing again to the same prefix must not be read through the old sample indices."""
    prefix = str(write_indexed(tmp_path / "C", [20] * 50))
    cache = tmp_path / "cache"
    build(prefix, cache=cache, num_samples=(10, 0, 0))
    written = sorted(cache.iterdir())
    build(prefix, cache=cache, num_samples=(10, 0, 0))
    assert sorted(cache.iterdir()) == written
    write_indexed(tmp_path / "C", [40] * 20)
    train = build(prefix, cache=cache, num_samples=(10, 0, 0)).train
    assert len(list(cache.iterdir())) == 2 * len(written)
    assert documents_in(train) <= set(range(1, 17))


def test_fingerprint_changes_with_the_documents(tmp_path: Path) -> None:
    seen = set()
    for lengths in ([10] * 5000, [10] * 5001, [10] * 2500 + [9, 11] + [10] * 2498):
        seen.add(fingerprint(write_indexed(tmp_path / "C", lengths)))
    assert len(seen) == 3


def test_without_a_cache_path_the_indices_go_beside_the_data(tmp_path: Path) -> None:
    prefix = str(write_indexed(tmp_path / "C", [20] * 50))
    assert len(build(prefix, num_samples=(10, 0, 0)).train) >= 10
    assert (tmp_path / "C" / "cache" / "GPTDataset_indices").is_dir()


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data_path": ["A.bin"]}, r"A\.bin\.bin: no such file; give the prefix without \.bin: A"),
        ({"data_path": ["X"]}, r"X\.bin: no such file; give the prefix of a \.bin/\.idx pair"),
        ({"data_path": ["0.3", "A", "B"]}, "or a weight before each"),
        ({"data_path": ["0.3", "A", "x", "B"]}, "or a weight before each"),
        ({"data_path": ["-1", "A", "2", "B"]}, "each weight must be above zero"),
        ({"data_path": ["A"], "split": "90,x"}, "must be up to three shares"),
        ({"data_path": ["A"], "split": "1,1,1,1"}, "must be up to three shares"),
        ({"data_path": ["A"], "split": "0,0,0"}, "gives nothing to anyone"),
        ({"data_path": ["A"], "split": "100"}, r"leaves nothing of its 200 documents for valid"),
        ({}, "none was given"),
        ({"data_path": ["A"], "train_data_path": ["B"]}, "both were given"),
        ({"train_data_path": ["A"]}, "--valid-data-path is missing, and 20 valid samples"),
        ({"data_path": ["A"], "vocab_size": 100}, "A holds token 1[0-9]{2}, the model's vocab"),
        (
            {"data_path": ["A"], "eod_token": 5000, "eod_mask_loss": True},
            "no document ends with the end-of-document token 5000",
        ),
    ],
)
def test_mistakes_are_refused_with_a_way_out(settings, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        build(**{"data_path": None, "cache": tmp_path, **settings})


def test_missing_data_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        build("0.2", "X", "0.3", "A", "0.5", "Y", cache=tmp_path)
    assert len(caught.value.faults) == 2


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    prefix = write_indexed(tmp_path / "C", [20] * 50)
    data = Path(f"{prefix}.bin").read_bytes()
    Path(f"{prefix}.bin").write_bytes(data[:-2])
    with pytest.raises(UserError, match=r"C\.bin has 1998 bytes, .*C\.idx describes 2000"):
        open_indexed(prefix)
    index = Path(f"{prefix}.idx").read_bytes()
    Path(f"{prefix}.idx").write_bytes(index[:-1])
    with pytest.raises(UserError, match=r"C\.idx has 1041 bytes and should have 1042"):
        open_indexed(prefix)
    Path(f"{prefix}.idx").write_bytes(b"something else")
    with pytest.raises(UserError, match=r"C\.idx is not an index of Megatron's"):
        open_indexed(prefix)
    Path(f"{prefix}.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"C\.bin is empty"):
        open_indexed(prefix)


def test_an_unwritable_cache_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--data-cache-path a folder that can be written"):
        build("A", cache=tmp_path / "file")


def test_a_lone_prefix_near_the_right_one_is_pointed_out(tmp_path: Path) -> None:
    write_indexed(tmp_path / "corpus_text_document", [5, 5])
    with pytest.raises(UserError, match="there is corpus_text_document"):
        open_indexed(tmp_path / "corpus")


def test_blends_are_parsed_as_megatron_does() -> None:
    assert parse_blend(["A"]) == (["A"], None)
    assert parse_blend(["A", "B"]) == (["A", "B"], None)
    assert parse_blend(["30", "A", ".7", "B"]) == (["A", "B"], [30.0, 0.7])


def test_batches_hold_just_the_keys_that_training_reads(tmp_path: Path) -> None:
    train = build("0.5", "A", "0.5", "B", cache=tmp_path).train
    batch = next(build_data_iterator(train, 0, 3, 0, 1))
    assert sorted(batch) == sorted(BATCH_KEYS)
    assert batch["tokens"].shape == (3, 16)
