"""Samples, packs, epochs and batches of tokenized chats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from chats import CHATML, TURNS, said, save_chat_tokenizer, write_rows
from corpora import write_documents
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from qwen2_ascend.data.chat import prepare
from qwen2_ascend.data.chat.build import ChatDatasetBuilder
from qwen2_ascend.data.chat.packing import best_fit_decreasing
from qwen2_ascend.data.chat.settings import ChatSettings
from qwen2_ascend.data.sampler import build_data_iterator
from qwen2_ascend.errors import UserError

SEQ_LENGTH = 64


def write_stored(
    prefix: Path, chats: Sequence[tuple[list[int], ...]], keys=("input_ids", "labels")
) -> None:
    """Rows of ids and labels, as MindSpeed-LLM writes them, or what `keys` names."""
    for i, key in enumerate(keys):
        rows = [chat[i] for chat in chats]
        write_documents(f"{prefix}_packed_{key}_document", rows, np.int32)


def chat(number: int, length: int, trained: int | None = None) -> tuple[list[int], list[int]]:
    """A chat whose every token says which chat and where; its last `trained` ones have a loss."""
    ids = [1000 * number + 10 + place for place in range(length)]
    trained = length // 2 if trained is None else trained
    return ids, [-100] * (length - trained) + ids[length - trained :]


LENGTHS = [5, 40, 64, 17, 3, 90, 33, 21, 8, 59, 2, 30]
CHATS = [chat(n, length) for n, length in enumerate(LENGTHS)]
CHATS[5] = chat(5, 90, trained=60)  # some of it is left when the chat is cut


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    write_stored(tmp_path / "a", CHATS)
    return str(tmp_path / "a")


def build(prefix: str, **more):
    given = {"seq_length": SEQ_LENGTH, "seed": 3, "data_path": [prefix]}
    return ChatDatasetBuilder(**{**given, **more}).build()


def all_samples(dataset) -> list[dict]:
    return [dataset[i] for i in range(len(dataset))]


def pieces(sample: dict) -> list[dict]:
    """The documents of a sample."""
    edges = [0, *sample.get("ends", (len(sample["tokens"]),))]
    return [
        {key: sample[key][start:end].tolist() for key in ("tokens", "labels", "position_ids")}
        | {"loss_mask": sample["loss_mask"][start:end].tolist()}
        for start, end in pairwise(edges)
    ]


def check_piece(piece: dict) -> int | None:
    """The number of the chat that a piece is, after checking all of it; None for padding."""
    tokens, n = piece["tokens"], len(piece["tokens"])
    assert piece["position_ids"] == list(range(n))
    if tokens[0] < 10:
        assert set(tokens) == {0} and not any(piece["loss_mask"])
        return None
    number = tokens[0] // 1000
    ids, labels = (row[:SEQ_LENGTH] for row in CHATS[number])
    assert tokens == ids
    assert piece["labels"][:-1] == ids[1:]
    assert piece["loss_mask"] == [float(label != -100) for label in labels[1:]] + [0.0]
    return number


def test_packs_hold_every_chat_once_each_by_itself(prefix: str) -> None:
    """Labels are moved inside a chat, positions restart, padding is a last document of its own."""
    built = build(prefix, pack=True)
    assert built.train.is_packed
    found = []
    for sample in all_samples(built.train):
        dtypes = {key: value.dtype for key, value in sample.items() if key != "ends"}
        assert dtypes.pop("loss_mask") == torch.float32
        assert dtypes == dict.fromkeys(("tokens", "labels", "position_ids", "index"), torch.int64)
        assert sample["ends"][-1] == len(sample["tokens"]) == SEQ_LENGTH
        numbers = [check_piece(piece) for piece in pieces(sample)]
        assert None not in numbers[:-1]
        found += [number for number in numbers if number is not None]
    assert sorted(found) == list(range(len(CHATS)))
    tokens = sum(min(length, SEQ_LENGTH) for length in LENGTHS)
    samples = built.train.samples_per_epoch
    assert built.notes == (
        f"train: 12 chats, {tokens} tokens, 1 cut at 64, {samples} samples of 64, "
        f"{tokens / samples / 64:.1%} full",
    )


def test_single_chats_are_padded_behind(prefix: str) -> None:
    built = build(prefix, shuffle=False)
    assert not built.train.is_packed
    for number, sample in enumerate(all_samples(built.train)):
        assert "ends" not in sample
        length = min(LENGTHS[number], SEQ_LENGTH)
        assert sample["position_ids"].tolist() == list(range(SEQ_LENGTH))
        assert set(sample["tokens"][length:].tolist()) <= {0}
        assert not sample["loss_mask"][length - 1 :].any()
        cut = {key: value[:length] for key, value in sample.items() if key != "index"}
        assert check_piece(pieces(cut)[0]) == number == sample["index"]


@pytest.mark.parametrize("multiple", [1, 8])
def test_variable_lengths_are_those_of_the_longest_in_the_batch(prefix: str, multiple: int) -> None:
    data = build(
        prefix, shuffle=False, variable_seq_lengths=True, pad_to_multiple_of=multiple
    ).train
    padded = build(prefix, shuffle=False).train
    for first in range(0, 12, 3):
        batch = data.collate([data[i] for i in range(first, first + 3)])
        longest = min(SEQ_LENGTH, max(LENGTHS[first : first + 3]))
        s = -(-longest // multiple) * multiple
        assert batch["tokens"].shape == (3, s)
        whole = padded.collate([padded[i] for i in range(first, first + 3)])
        for key, value in batch.items():
            assert value.equal(whole[key][:, :s] if key != "index" else whole[key]), key


def test_a_batchs_ends_run_over_its_rows(prefix: str) -> None:
    data = build(prefix, pack=True).train
    batch = next(build_data_iterator(data, 0, 3, 0, 1))
    rows = [data[i]["ends"] for i in range(3)]
    expected = [64 * row + end for row in range(3) for end in rows[row]]
    assert batch["ends"] == tuple(expected)
    assert batch["ends"][-1] == 3 * SEQ_LENGTH == batch["tokens"].numel()
    assert all(isinstance(end, int) for end in batch["ends"])
    for end in expected[:-1]:
        assert batch["position_ids"].flatten()[end] == 0


def test_processes_that_read_ahead_give_the_same(prefix: str) -> None:
    data = build(prefix, pack=True, num_samples=(12, 0)).train
    plain, ahead = (list(build_data_iterator(data, 0, 3, 0, 1, workers)) for workers in (0, 1))
    assert len(plain) == len(ahead) == 4
    for one, other in zip(plain, ahead, strict=True):
        assert one.pop("ends") == other.pop("ends")
        assert all(value.equal(other[key]) for key, value in one.items())


# --- packing --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=80), st.integers(50, 120), st.integers(0, 3))
def test_every_chat_is_in_one_pack_and_no_pack_overflows(lengths, capacity, seed) -> None:
    packing = best_fit_decreasing(lengths, capacity, seed)
    packs = [packing.pack(i).tolist() for i in range(len(packing))]
    assert sorted(chat for pack in packs for chat in pack) == list(range(len(lengths)))
    totals = [sum(lengths[chat] for chat in pack) for pack in packs]
    assert all(0 < total <= capacity for total in totals)
    # no two packs could be one: a chat is only given a new pack when it fits in none
    assert all(a + b > capacity for i, a in enumerate(totals) for b in totals[:i])


def test_packing_depends_on_the_seed_alone() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 400)
    first, same, other = (best_fit_decreasing(lengths, 128, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.order, same.order) and np.array_equal(first.starts, same.starts)
    assert not np.array_equal(first.order, other.order)
    assert len(first) == len(other)
    assert lengths.sum() / (len(first) * 128) > 0.97


# --- epochs, ranks, resuming ----------------------------------------------------------------------


def test_every_epoch_has_every_sample_in_an_order_of_its_own(prefix: str) -> None:
    data = build(prefix, num_samples=(30, 0)).train
    order = [int(sample["index"]) for sample in all_samples(data)]
    epochs = [order[:12], order[12:24], order[24:]]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1] != list(range(12))
    assert len(set(epochs[2])) == 6
    assert [int(s["index"]) for s in all_samples(data.with_num_samples(40))][:30] == order
    again = build(prefix, num_samples=(30, 0), seed=4).train
    assert [int(sample["index"]) for sample in all_samples(again)] != order


@pytest.mark.parametrize("pack", [True, False])
def test_ranks_share_the_samples_out_and_a_resumed_run_goes_on(prefix: str, pack: bool) -> None:
    def read(consumed: int, dp_size: int, count: int) -> list[int]:
        """The samples of `count` steps of global batch 4, by all ranks, in Megatron's order."""
        iterators = (
            build_data_iterator(data, consumed, 2, rank, dp_size) for rank in range(dp_size)
        )
        ranks = [[batch["index"].tolist() for batch in batches] for batches in iterators]
        steps = zip(*ranks, strict=True)
        return [i for step in steps for rank in step for i in rank][: 4 * count]

    data = build(prefix, pack=pack, num_samples=(24, 0)).train
    expected = [int(data[i]["index"]) for i in range(24)]
    assert read(0, 1, 6) == read(0, 2, 6) == expected
    assert read(8, 2, 4) == read(8, 1, 4) == expected[8:]


def test_validation_is_the_split_and_training_does_not_see_it(prefix: str) -> None:
    built = build(prefix, split="75,25,0", shuffle=False, num_samples=(None, None))
    assert (len(built.train), len(built.valid)) == (9, 3)
    numbers = [[int(s["tokens"][0]) // 1000 for s in all_samples(d)] for d in built[:2]]
    assert numbers == [list(range(9)), [9, 10, 11]]


# --- pairs ----------------------------------------------------------------------------------------


def write_pairs(prefix: Path, chosen: list, rejected: list) -> None:
    for side, chats in (("chosen", chosen), ("rejected", rejected)):
        write_stored(prefix, chats, keys=(f"{side}_input_ids", f"{side}_labels"))


def test_pairs_are_two_rows_chosen_first(tmp_path: Path) -> None:
    chosen = [chat(n, 10 + n) for n in range(4)]
    rejected = [chat(n + 50, 20 - n) for n in range(4)]
    write_pairs(tmp_path / "p", chosen, rejected)
    data = build(str(tmp_path / "p"), task="dpo", variable_seq_lengths=True, num_samples=(8, 0))
    batch = data.train.collate([data.train[i] for i in range(3)])
    numbers = batch["index"].tolist()
    assert batch["tokens"].shape == (6, 20 - min(numbers))
    assert (batch["tokens"][:, 0] // 1000).tolist() == numbers + [n + 50 for n in numbers]
    for row, number in enumerate([*numbers, *(n + 50 for n in numbers)]):
        ids, labels = dict(zip(range(54), [*chosen, *[None] * 46, *rejected], strict=True))[number]
        assert batch["tokens"][row, : len(ids)].tolist() == ids
        places = batch["loss_mask"][row].nonzero().flatten()
        assert batch["labels"][row, places].tolist() == [i for i in labels if i != -100]


# --- stored by others, and mistakes ---------------------------------------------------------------


def test_mindspeeds_packs_are_read_by_their_mask(tmp_path: Path) -> None:
    """--neat-pack numbers the chats of a row from 1; 0 is padding."""
    rows = [[0, 3], [1, 4, 8]]
    packed = []
    for row in rows:
        ids = [i for n in row for i in CHATS[n][0]]
        labels = [i for n in row for i in CHATS[n][1]]
        mask = [k for k, n in enumerate(row, 1) for _ in CHATS[n][0]]
        rest = 60 - len(ids)
        packed.append((ids + [0] * rest, labels + [-100] * rest, mask + [0] * rest))
    write_stored(tmp_path / "m", packed, keys=("input_ids", "labels", "attention_mask"))
    data = build(str(tmp_path / "m"), shuffle=False).train
    assert data.is_packed
    found = [[check_piece(piece) for piece in pieces(sample)] for sample in all_samples(data)]
    assert found == [[*row, None] for row in rows]
    with pytest.raises(UserError, match=r"was packed to 60 tokens .* give --seq-length 60"):
        build(str(tmp_path / "m"), seq_length=50)
    with pytest.raises(UserError, match="leave --variable-seq-lengths out"):
        build(str(tmp_path / "m"), variable_seq_lengths=True)


def test_chats_with_no_loss_left_stop_or_are_left_out(tmp_path: Path) -> None:
    write_stored(tmp_path / "a", [*CHATS, chat(12, 80, trained=10)])
    with pytest.raises(UserError, match=r"1 train chat\(s\) have no token .* row 12 of "):
        build(str(tmp_path / "a"))
    built = build(str(tmp_path / "a"), on_bad_row="skip")
    assert len(built.train) == 12
    note = "left out: 1 train chat(s) have no token to train on in the first 64"
    assert note in built.notes


def test_pairs_whose_answers_part_behind_the_cut_stop_or_are_left_out(tmp_path: Path) -> None:
    """Chosen and rejected are then the same, and such a pair's gradient is zero."""
    ids = list(range(1, 81))
    labels = [-100] * 10 + ids[10:]
    longer = [(ids, labels), (ids[:20], labels[:20]), (ids[:64], labels[:64])]
    other = [([*ids[:79], 99], [*labels[:79], 99]), (ids[:19], labels[:19]), (ids, labels)]
    write_pairs(tmp_path / "p", longer, other)
    with pytest.raises(UserError, match=r"2 train pair\(s\) have the same answers in the first 64"):
        build(str(tmp_path / "p"), task="dpo")
    built = build(str(tmp_path / "p"), task="dpo", on_bad_row="skip")
    assert len(built.train) == 1
    assert len(build(str(tmp_path / "p"), task="dpo", seq_length=80).train) == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"data_path": []}, "none was given"),
        ({"train_data_path": ["b"]}, "both were given"),
        ({"data_path": ["0.3", "a"]}, "not blended by weights"),
        ({"pack": True, "variable_seq_lengths": True}, "leave --variable-seq-lengths out"),
        ({"pack": True, "task": "dpo"}, "--pack is for chats"),
        ({"num_samples": (None, 4)}, "4 valid samples are wanted and there is no valid data"),
        ({"vocab_size": 300}, "holds token .*, the model's vocabulary ends at 299"),
        ({"data_path": ["/nowhere/a.jsonl"]}, "/nowhere/a.jsonl: no such file"),
        ({"data_path": ["/nowhere/a"]}, "no such file"),
    ],
)
def test_settings_that_cannot_be(prefix: str, more: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(prefix, **more)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_stored(tmp_path / "a", [([1, 2, 3], [-100, 2, 3]), ([4, 5], [-100, 6])])
    with pytest.raises(UserError, match="row 1 has the label 6 at token 5"):
        build(str(tmp_path / "a"))
    for key, seed in (("input_ids", 1), ("labels", 2)):
        about = {"settings": {"pad_token": 0, "seed": seed}}
        (tmp_path / f"c_packed_{key}_document.json").write_text(json.dumps(about))
    write_stored(tmp_path / "c", CHATS)
    with pytest.raises(UserError, match="one is as an earlier run left it"):
        build(str(tmp_path / "c"))
    write_stored(tmp_path / "b", [([1, 2, 3], [-100, 2])])
    with pytest.raises(UserError, match="input_ids and labels are not of the same lengths"):
        build(str(tmp_path / "b"))


# --- files of chats -------------------------------------------------------------------------------


def test_a_file_of_chats_is_prepared_once(tmp_path: Path, capsys) -> None:
    tokenizer = save_chat_tokenizer(tmp_path / "tokenizer")
    rows = [{"messages": [said("user", f"q {n}"), said("assistant", f"a {n}")]} for n in range(5)]
    path = write_rows(tmp_path / "chats.jsonl", rows)

    def texts(tokenizer: Path = tokenizer) -> set[str]:
        data = build(str(path), tokenizer=str(tokenizer), workers=1, pack=True).train
        decode = AutoTokenizer.from_pretrained(tokenizer).decode
        return {decode(sample["labels"][sample["loss_mask"] == 1]) for sample in all_samples(data)}

    before = texts()
    assert "".join(sorted(before)).count("<|im_end|>") == 5
    assert "chats            5" in capsys.readouterr().out
    assert texts() == before
    assert "complete already" in capsys.readouterr().out
    checkpoint = tmp_path / "run/iter_0000002"  # what a run that goes on reads
    shutil.copytree(tokenizer, checkpoint, copy_function=shutil.copyfile)
    (checkpoint / "run.json").write_text("{}")
    assert texts(checkpoint) == before
    assert "complete already" in capsys.readouterr().out
    write_rows(path, rows[:3])
    assert "".join(texts()).count("<|im_end|>") == 3
    assert "chats            3" in capsys.readouterr().out


def test_what_is_kept_is_not_taken_for_another_tokenizers_or_another_releases(
    tmp_path: Path, monkeypatch
) -> None:
    """A tokenizer may be named as the local Hugging Face cache has it, where it is no path."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": TURNS[0]}])
    for name, template in (("a", CHATML), ("b", CHATML.replace("helpful", "brief"))):
        model = tmp_path / f"hub/models--q--{name}"
        (model / "refs").mkdir(parents=True)
        (model / "refs/main").write_text("1")
        save_chat_tokenizer(model / "snapshots/1", template)

    def tokens(name: str) -> list[int]:
        data = build(str(path), tokenizer=f"q/{name}", workers=1).train
        return all_samples(data)[0]["tokens"].tolist()

    def num_kept() -> int:
        return len(list((tmp_path / prepare.CACHE_FOLDER).glob("*_labels_document.idx")))

    first, second = tokens("a"), tokens("b")
    assert first != second and num_kept() == 2
    assert tokens("a") == first and num_kept() == 2
    monkeypatch.setattr(prepare, "_code", lambda: "another release")
    assert tokens("a") == first and num_kept() == 3


def test_a_place_for_prepared_chats_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    tokenizer = save_chat_tokenizer(tmp_path / "tokenizer")
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": TURNS[0]}])
    (tmp_path / ".qwen2_ascend_cache").write_text("in the way")
    with pytest.raises(UserError, match=r"_cache: chats cannot be .* give --data-cache-path"):
        build(str(path), tokenizer=str(tokenizer), workers=1)
    build(str(path), tokenizer=str(tokenizer), workers=1, data_cache_path=tmp_path / "there")


def test_prompt_type_reaches_the_samples_of_a_file(tmp_path: Path) -> None:
    """A file that was prepared with another template is prepared again."""
    folder = save_chat_tokenizer(tmp_path / "tokenizer", "{{ messages[0].content }}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [said("user", "q"), said("assistant", "a"), said("user", "r"), said("assistant", "b")]
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": turns}])
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>"
    chat = f"{turn.format('q', 'a')}\n{turn.format('r', 'b')}"
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    for name, text in (("qwen", system + chat), ("chatml", chat)):
        settings = ChatSettings(prompt_type=name)
        built = build(str(path), tokenizer=str(folder), workers=1, chat=settings, seq_length=512)
        (sample,) = all_samples(built.train)
        assert tokenizer.decode(sample["tokens"]).replace("<|endoftext|>", "") == text
        trained = sample["labels"][sample["loss_mask"] == 1]
        assert tokenizer.decode(trained) == "a<|im_end|>b<|im_end|>"


def test_a_bad_row_of_a_file_stops_the_run_with_its_line(tmp_path: Path) -> None:
    tokenizer = save_chat_tokenizer(tmp_path / "tokenizer")
    good = {"messages": [said("user", "q"), said("assistant", "a")]}
    path = write_rows(tmp_path / "chats.jsonl", [good, {"messages": []}])
    settings = {"tokenizer": str(tokenizer), "workers": 1}
    with pytest.raises(UserError, match=r"chats\.jsonl:2: 'messages' is empty"):
        build(str(path), **settings)
    assert len(build(str(path), on_bad_row="skip", **settings).train) == 1
