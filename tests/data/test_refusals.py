"""Data that cannot be used is refused by every launcher at once: before there is any group.

Each is started as rank 0 of two with no other rank: whoever asked for a group would wait for it.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.chats import said, write_rows
from data.corpora import write_indexed
from qwen2_ascend.finetuning import command as finetune
from qwen2_ascend.finetuning.deepspeed import command as finetune_deepspeed
from qwen2_ascend.training import command as pretrain

Started = Callable[[Callable[..., int], str], list[str]]
NEEDED = "--config 0.5B --seq-length 32 --lr 1e-5 --train-iters 3 --global-batch-size 2"
TUNERS = [finetune.main, finetune_deepspeed.main]
CHAT = {"messages": [said("user", "a"), said("assistant", "b")]}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Started:
    """Runs a launcher that has to end with 2 before it starts the runtime; gives its faults."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the runtime was started")

    monkeypatch.setattr("qwen2_ascend.runtime.start", forbidden)
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))

    def run(main: Callable[..., int], flags: str) -> list[str]:
        status = main([*NEEDED.split(), *flags.split()])
        out, err = capsys.readouterr()
        assert status == 2, err
        assert out == "" and "Traceback" not in err
        lines = err.splitlines()
        assert all(line.startswith("error: ") for line in lines), err
        return [line.removeprefix("error: ") for line in lines]

    return run


def one_with(faults: list[str], *words: str) -> None:
    """There is exactly one fault with all the words."""
    assert len([fault for fault in faults if all(word in fault for word in words)]) == 1, faults


def test_pretraining_names_every_fault_of_its_data(started: Started, tmp_path: Path) -> None:
    write_indexed(tmp_path / "good", [40, 70], dtype=np.uint16)
    for name in ("empty", "short", "foreign", "mixed", "unread"):
        write_indexed(tmp_path / name, [40, 70], dtype=np.uint16)
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "short.idx").write_bytes((tmp_path / "short.idx").read_bytes()[:-1])
    (tmp_path / "foreign.idx").write_text("something else")
    (tmp_path / "mixed.bin").write_bytes(bytes(7))
    (tmp_path / "unread.idx").unlink()
    (tmp_path / "unread.idx").symlink_to("/proc/self/mem")
    names = ("good", "empty", "short", "foreign", "mixed", "unread", "absent")
    words = " ".join(f"{tmp_path}/{name}" for name in names)
    faults = started(pretrain.main, f"--data-path {words} --split none --micro-batch-size 0")
    one_with(faults, "absent.bin: no such file")
    one_with(faults, "empty.bin is empty")
    one_with(faults, "short.idx has", "cut short")
    one_with(faults, "foreign.idx is not an index")
    one_with(faults, "mixed.bin has 7 bytes", "describes 220")
    one_with(faults, "unread", "cannot be read: Input/output error")
    one_with(faults, "split='none'")
    one_with(faults, "--micro-batch-size")
    assert len(faults) == 8, faults


@pytest.mark.parametrize("main", TUNERS)
def test_fine_tuning_names_every_fault_of_its_data(
    main: Callable[..., int], started: Started, tmp_path: Path
) -> None:
    good = write_rows(tmp_path / "good.jsonl", [CHAT])
    column = write_rows(tmp_path / "column.jsonl", [{"question": "a", "answer": "b"}])
    empty = write_rows(tmp_path / "empty.jsonl", [])
    (tmp_path / "zip.jsonl.gz").write_bytes(gzip.compress(b"{}" * 1000)[:20])
    (tmp_path / "json.json").write_text('[{"messages": ')
    (tmp_path / "table.parquet").write_text("no table")
    (tmp_path / "unread.jsonl").symlink_to("/proc/self/mem")
    others = " ".join(
        f"{tmp_path}/{name}"
        for name in ("absent.jsonl", "zip.jsonl.gz", "json.json", "table.parquet", "unread.jsonl")
    )
    faults = started(
        main, f"--data-path {good} {column} {empty} {others} {tmp_path}/prefix --clip-grad -1"
    )
    one_with(faults, "column.jsonl:1: has no 'messages'; it has 'question', 'answer'")
    one_with(faults, "empty.jsonl: holds no row")
    one_with(faults, "--data-path", "absent.jsonl: no such file")
    one_with(faults, "zip.jsonl.gz: damaged or incomplete gzip")
    one_with(faults, "json.json:1: is not JSON")
    one_with(faults, "table.parquet: is not a Parquet file")
    one_with(faults, "unread.jsonl: cannot be read: Input/output error")
    one_with(faults, "prefix_packed_input_ids_document.bin: no such file")
    one_with(faults, "prefix_packed_labels_document.bin: no such file")
    one_with(faults, "--clip-grad")
    assert len(faults) == 10, faults


@pytest.mark.parametrize("main", TUNERS)
@pytest.mark.parametrize(
    "flag", ["--train-on-prompt", "--mask-history", "--map-keys {}", "--chat-template t"]
)
def test_how_chats_are_read_is_not_said_of_prepared_ones(
    main: Callable[..., int], flag: str, started: Started, tmp_path: Path
) -> None:
    """Their masks hold; where a file of chats is among the data, it is read so."""
    chats = write_rows(tmp_path / "chats.jsonl", [CHAT])
    fault = f"{flag.split()[0]}: the data is prepared"
    prepared = f"--data-path {tmp_path}/prefix {flag}"
    one_with(started(main, prepared), fault, "qwen2-ascend preprocess --task sft")
    for flags in (f"--data-path {tmp_path}/prefix {chats} {flag}", f"--data-path {chats} {flag}"):
        found = started(main, f"{flags} --clip-grad -1")
        assert not [one for one in found if fault in one], found
    found = started(main, f"{prepared} --save {tmp_path}/run --save-hf {tmp_path}/hf")
    assert bool([one for one in found if fault in one]) == ("template" not in flag), found


def test_columns_are_those_of_the_named_format(started: Started, tmp_path: Path) -> None:
    chats = write_rows(tmp_path / "chats.jsonl", [CHAT, CHAT])
    faults = started(finetune.main, f"--data-path {chats} --handler-name sharegpt")
    one_with(faults, "chats.jsonl:1: has no 'conversations'; it has 'messages'")
    faults = started(finetune.main, f"--data-path {chats} --stage dpo --pack")
    one_with(faults, "chats.jsonl:1", "--task dpo takes preference pairs")
    one_with(faults, "--pack is for chats")


@pytest.mark.parametrize("main", [pretrain.main, *TUNERS])
def test_data_and_weights_that_are_not_there_are_both_named(
    main: Callable[..., int], started: Started, tmp_path: Path
) -> None:
    flags = f"--load {tmp_path}/model --data-path {tmp_path}/absent.jsonl"
    faults = started(main, flags)
    one_with(faults, "--load", "model: there is no checkpoint in it")
    one_with(faults, "absent.jsonl", "no such file")


@pytest.mark.parametrize("main", [pretrain.main, *TUNERS])
def test_no_data_at_all(main: Callable[..., int], started: Started) -> None:
    one_with(started(main, ""), "--data-path")
