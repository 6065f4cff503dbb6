"""Runs killed at every change of the disk: the same command goes on, to the same bits.

A case tries one place in PARTS; all cases together try all of them.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data.chats import chat_rows, save_chat_tokenizer, write_rows
from helpers import make_tiny_hugging_face_folder, tiny_config
from killing import Driver

PARTS = 24

Runs = Callable[[str], tuple[Path, int]]
KILLED = -9
PRETRAIN, FINETUNE = "qwen2_ascend.training.command", "qwen2_ascend.finetuning.command"
ZERO = "qwen2_ascend.finetuning.deepspeed.command"
EVERY_WRITE = 100
"""Writes into a file that has no name yet differ little; so many count as one call."""
MODULES = (
    "qwen2_ascend.training.pretrain",
    "qwen2_ascend.training.checkpointing",
    "qwen2_ascend.training.setup",
    "qwen2_ascend.finetuning.finetune",
    "qwen2_ascend.finetuning.lora_checkpoint",
    "qwen2_ascend.finetuning.deepspeed.finetune",
    "qwen2_ascend.finetuning.deepspeed.checkpoint",
    "qwen2_ascend.model.build",
    "qwen2_ascend.data.chat.build",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.optimizer",
)
COMMON = (
    "--global-batch-size 2 --train-iters 4 --lr 1e-3 --save-interval 2 --device cpu --no-log-energy"
)
KINDS = {
    "torch_dist": (PRETRAIN, "--mock-data --seq-length 16"),
    "torch": (PRETRAIN, "--mock-data --seq-length 16 --ckpt-format torch --bf16"),
    "async": (PRETRAIN, "--mock-data --seq-length 16 --async-save --keep-last 1"),
    "lora": (FINETUNE, "--data-path {d}/chats.jsonl --seq-length 288 --lora-r 2 --lora-alpha 4"),
    "zero": (ZERO, "--data-path {d}/chats.jsonl --seq-length 288 --zero-stage 2"),
}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    started = Driver(tmp_path_factory.mktemp("driver"), MODULES, every_write=EVERY_WRITE)
    yield started
    started.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crash")
    config = tiny_config(tie_word_embeddings=True, vocab_size=400, max_position_embeddings=512)
    make_tiny_hugging_face_folder(folder / "hf", config)
    save_chat_tokenizer(folder / "hf")
    write_rows(folder / "chats.jsonl", chat_rows(16))
    return folder


@pytest.fixture(scope="module")
def whole(world: Path, driver: Driver) -> Runs:
    """By kind, where a run is that nobody killed, and how often it changed the disk."""

    @functools.cache
    def of(kind: str) -> tuple[Path, int]:
        if KINDS[kind][0] != PRETRAIN:
            driver.run(*flags_of(kind, world, world / f"{kind}-first"))  # prepares the chats
        run = driver.run(*flags_of(kind, world, world / kind))
        assert run.status == 0
        return world / kind, run.calls

    return of


def flags_of(kind: str, world: Path, save: Path, load: Path | None = None) -> tuple[str, list[str]]:
    module, flags = KINDS[kind]
    start = f"--load {load or save} --pretrained-checkpoint {world / 'hf'} --save {save}"
    return module, f"{COMMON} {start} {flags.format(d=world)}".split()


def state(iteration: Path) -> dict[str, Any]:
    """The checksums of all tensors of a checkpoint."""
    manifest = json.loads((iteration / "qwen2_ascend_manifest.json").read_bytes())
    tensors = {
        f"{file} {name}": entry["xxh3_128"]
        for file, entries in manifest["tensors"].items()
        for name, entry in entries.items()
    }
    whole = {f: c for f, c in manifest["files"].items() if f.endswith(".safetensors")}
    return tensors | whole


def data_offset(iteration: Path, file: str) -> int:
    """A byte of some tensor's in a file."""
    manifest = json.loads((iteration / "qwen2_ascend_manifest.json").read_bytes())
    entries = manifest["tensors"].get(file)
    return next(iter(entries.values()))["offset"] if entries else 1000


def losses(save: Path) -> dict[int, float]:
    """The last that was said of each iteration's loss."""
    lines = (save / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {row["iteration"]: row["loss"] for row in rows if "loss" in row}


def places(calls: int, part: int) -> range:
    """The calls before which a run is killed in this part."""
    assert calls > PARTS, "every part has a place"
    return range(1 + part, calls + 1, PARTS)


def is_clean(save: Path) -> bool:
    return not [path.name for path in save.iterdir() if path.name.startswith(".iter_")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", range(PARTS))
def test_a_killed_run_goes_on(
    kind: str, part: int, whole: Runs, world: Path, driver: Driver, tmp_path: Path
) -> None:
    folder, calls = whole(kind)
    expected = state(folder / "iter_0000004")
    for point in places(calls, part):
        save = tmp_path / f"killed-{point}"
        module, flags = flags_of(kind, world, save)
        assert driver.run(module, flags, point).status == KILLED, point
        tracker = save / "latest_checkpointed_iteration.txt"
        announced = tracker.read_text() if tracker.exists() else None
        again = driver.run(module, flags)
        assert again.status == 0, (point, announced)
        assert state(save / "iter_0000004") == expected, point
        assert losses(save) == losses(folder), point
        assert (save / "iter_0000002").exists() == (kind != "async"), "--keep-last 1"
        assert is_clean(save), (point, sorted(path.name for path in save.iterdir()))
        shutil.rmtree(save)


@pytest.mark.parametrize("kind", ["torch_dist", "lora"])
@pytest.mark.parametrize("where", ["data", "small file", "manifest"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    kind: str, where: str, world: Path, driver: Driver, tmp_path: Path
) -> None:
    """Loudly; and the run arrives where it would have."""
    module, flags = flags_of(kind, world, tmp_path / "run")
    assert driver.run(module, flags).status == 0
    newest = tmp_path / "run" / "iter_0000004"
    expected = state(newest)
    weights = "__0_0.distcp" if kind == "torch_dist" else "adapter_model.safetensors"
    small = "common.pt" if kind == "torch_dist" else "run.json"
    names = {"data": weights, "small file": small, "manifest": "qwen2_ascend_manifest.json"}
    path = newest / names[where]
    spoilt = bytearray(path.read_bytes())
    spoilt[data_offset(newest, weights) if where == "data" else 4] ^= 0x10
    path.write_bytes(bytes(spoilt))
    again = driver.run(module, flags)
    assert again.status == 0
    assert state(newest) == expected
    said = driver.said()
    assert "iter_0000004 is damaged and NOT used" in said
    assert "iter_0000002 at iteration 2" in said
    for iteration in (tmp_path / "run").glob("iter_*"):
        (iteration / names["small file"]).write_bytes(b"no more")
    assert driver.run(module, flags).status == 2, "all are damaged"


def test_what_a_kill_left_of_older_iterations_goes(
    whole: Runs, world: Path, driver: Driver, tmp_path: Path
) -> None:
    """Killed between the tracker's change and --keep-last's, a complete run removes it."""
    folder, _ = whole("async")
    save = tmp_path / "run"
    shutil.copytree(folder, save)
    shutil.copytree(save / "iter_0000004", save / "iter_0000002")
    assert driver.run(*flags_of("async", world, save)).status == 0
    assert sorted(path.name for path in save.glob("iter_*")) == ["iter_0000004"]
    assert state(save / "iter_0000004") == state(folder / "iter_0000004")


def test_a_folder_belongs_to_one_run(world: Path, driver: Driver, tmp_path: Path) -> None:
    from qwen2_ascend.checkpoint.staging import FolderLock

    module, flags = flags_of("torch_dist", world, tmp_path / "run")
    lock = FolderLock(tmp_path / "run")
    lock.acquire()
    assert driver.run(module, flags).status == 2
    assert "another process is writing it" in driver.said()
    lock.release()
    assert driver.run(module, flags).status == 0


@pytest.mark.parametrize("kind", ["torch_dist", "lora"])
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two-renames"])
def test_the_tracked_iteration_may_be_written_again(
    kind: str,
    part: int,
    exchange: bool,
    whole: Runs,
    world: Path,
    driver: Driver,
    tmp_path: Path,
) -> None:
    """The run goes on from iteration 2, over the iteration 4 that is there and tracked."""
    folder, _ = whole(kind)
    expected = state(folder / "iter_0000004")
    module, flags = flags_of(
        kind, world, tmp_path / "again", load=tmp_path / "again" / "iter_0000002"
    )
    shutil.copytree(folder, tmp_path / "again")
    calls = driver.run(module, flags).calls
    assert "iter_0000002 at iteration 2" in driver.said()
    for point in places(calls, part):
        save = tmp_path / f"killed-{point}"
        shutil.copytree(folder, save)
        module, flags = flags_of(kind, world, save, load=save / "iter_0000002")
        assert driver.run(module, flags, point).status == KILLED, point
        if not exchange and (partial := save / ".iter_0000004.partial").exists():
            # what a file system that cannot exchange two folders shows between two renames
            os.rename(save / "iter_0000004", save / ".iter_0000004.replaced")
            assert partial.is_dir()
        module, flags = flags_of(kind, world, save)
        assert driver.run(module, flags).status == 0, point
        assert state(save / "iter_0000004") == expected, point
        shutil.rmtree(save)
