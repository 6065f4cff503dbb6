"""Runs killed at every change of the disk: the same command goes on, to the same bits.

What a kill would leave is copied from one run (killing.py); a commit tries a third of it. Some
processes are really killed, at places that the commit chooses.
"""

from __future__ import annotations

import functools
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from data.chats import chat_rows, save_chat_tokenizer, write_rows
from helpers import make_tiny_hugging_face_folder, tiny_config
from killing import Driver
from selection import PAIRS_SEED

States = Sequence[Path]
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
    "deepspeed.runtime.zero.muon.muon_optimizer",
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
    refused = f"{COMMON} --pretrained-checkpoint /nowhere --seq-length 8 --data-path /no".split()
    first = [(command, *refused) for command in (PRETRAIN, FINETUNE, ZERO)]
    folder = tmp_path_factory.mktemp("driver")
    started = Driver(folder, MODULES, first, every_write=EVERY_WRITE)
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
        driver.run(*flags_of(kind, world, world / f"{kind}-first"))  # fills caches
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


def is_clean(save: Path) -> bool:
    return not [path.name for path in save.iterdir() if path.name.startswith(".iter_")]


def go_on(kind: str, world: Path, driver: Driver, save: Path, whole: Path) -> None:
    """The same command once more makes of a folder what a run makes that nobody killed.

    It begins where the tracker says or later, and nothing that it finds there is damaged.
    """
    tracker = save / "latest_checkpointed_iteration.txt"
    announced = int(tracker.read_text()) if tracker.exists() else 0
    driver.said()
    ended, said = driver.run(*flags_of(kind, world, save)), driver.said()
    assert ended.status == 0, said
    begun = re.search(r"resumed .* at iteration (\d+)\n", said)
    assert int(begun[1] if begun else 0) >= announced, said
    assert "NOT used" not in said
    assert state(save / "iter_0000004") == state(whole / "iter_0000004")
    assert is_clean(save), sorted(path.name for path in save.iterdir())


def assert_is_all_there(kind: str, save: Path, whole: Path) -> None:
    assert losses(save) == losses(whole)
    assert (save / "iter_0000002").exists() == (kind != "async"), "--keep-last 1"


@pytest.mark.every_commit
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_kill_leaves_goes_on(
    kind: str, whole: Runs, world: Path, driver: Driver, memory: Path, a_third: Any
) -> None:
    folder, calls = whole(kind)
    runs = memory / "runs"  # a lock lies beside the run's folder
    save = runs / "run"
    states = driver.states(*flags_of(kind, world, save), runs, memory / "states")
    assert len(states) > calls / 4, "most calls change something"
    for left in a_third(states):
        shutil.rmtree(runs)
        left.rename(runs)
        go_on(kind, world, driver, save, folder)
        assert_is_all_there(kind, save, folder)


@pytest.mark.every_commit
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on(
    kind: str, whole: Runs, world: Path, driver: Driver, tmp_path: Path
) -> None:
    """By a real SIGKILL, of which threads and locks go too."""
    folder, calls = whole(kind)
    point = random.Random(os.environ[PAIRS_SEED] + kind).randint(1, calls)
    save = tmp_path / "run"
    assert driver.run(*flags_of(kind, world, save), point).status == KILLED, point
    go_on(kind, world, driver, save, folder)
    assert_is_all_there(kind, save, folder)


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


@pytest.mark.every_commit
@pytest.mark.parametrize("kind", ["torch_dist", "lora"])
@pytest.mark.parametrize("can_exchange", [True, False], ids=["exchange", "two-renames"])
def test_the_tracked_iteration_may_be_written_again(
    kind: str,
    can_exchange: bool,
    whole: Runs,
    world: Path,
    driver: Driver,
    memory: Path,
    a_third: Any,
) -> None:
    """The run goes on from iteration 2, over the iteration 4 that is there and tracked."""
    folder, _ = whole(kind)
    runs = memory / "runs"
    save = runs / "run"
    again = flags_of(kind, world, save, load=save / "iter_0000002")
    shutil.copytree(folder, save)
    driver.said()
    states = driver.states(*again, runs, memory / "states", can_exchange)
    assert "iter_0000002 at iteration 2" in driver.said()
    if not can_exchange:  # the others are those of the other case
        states = [path for path in states if (path / "run/.iter_0000004.replaced").exists()]
        assert states
    for left in a_third(states):
        shutil.rmtree(runs)
        left.rename(runs)
        go_on(kind, world, driver, save, folder)
