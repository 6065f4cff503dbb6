"""Runs killed at every change of the disk: the same command goes on, to the same bits.

One of several places is tried, other ones for each value of QWEN2_CRASH_SEED; all of them with
QWEN2_CRASH_POINTS=all.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data.chats import chat_rows, save_chat_tokenizer, write_rows
from helpers import make_tiny_hugging_face_folder, tiny_config

SEED = int(os.environ.get("QWEN2_CRASH_SEED", "0"))
ALL = os.environ.get("QWEN2_CRASH_POINTS") == "all"
KILLED = -9
PRETRAIN, FINETUNE = "qwen2_ascend.training.pretrain", "qwen2_ascend.finetuning.finetune"
ZERO = "qwen2_ascend.finetuning.deepspeed.finetune"
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


class Driver:
    """The process that runs and kills launchers."""

    def __init__(self, folder: Path) -> None:
        self._log = open(folder / "log", "w")  # noqa: SIM115
        self._lines = open(folder / "log")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("killed_runs_driver.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def run(self, module: str, flags: str, point: int | None = None) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"module": module, "argv": flags.split(), "point": point}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def said(self) -> str:
        """Everything that has been printed since the last time."""
        return self._lines.read()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()
        self._lines.close()


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    started = Driver(tmp_path_factory.mktemp("driver"))
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


def flags_of(kind: str, world: Path, save: Path, load: Path | None = None) -> tuple[str, str]:
    module, flags = KINDS[kind]
    start = f"--load {load or save} --pretrained-checkpoint {world / 'hf'} --save {save}"
    return module, f"{COMMON} {start} {flags.format(d=world)}"


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


def places(calls: int, stride: int) -> range:
    """The calls before which a run is killed."""
    stride = 1 if ALL else stride
    return range(1 + SEED % stride, calls + 1, stride)


def is_clean(save: Path) -> bool:
    return not [path.name for path in save.iterdir() if path.name.startswith(".iter_")]


@pytest.mark.timeout(1200)
@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on(kind: str, world: Path, driver: Driver, tmp_path: Path) -> None:
    if KINDS[kind][0] != PRETRAIN:
        driver.run(*flags_of(kind, world, tmp_path / "first"))  # prepares the chats
    module, flags = flags_of(kind, world, tmp_path / "whole")
    undisturbed = driver.run(module, flags)
    assert undisturbed["status"] == 0
    expected = state(tmp_path / "whole" / "iter_0000004")
    points = places(undisturbed["calls"], 7 if kind == "torch_dist" else 13)
    assert len(points) > 3
    for point in points:
        save = tmp_path / f"killed-{point}"
        module, flags = flags_of(kind, world, save)
        assert driver.run(module, flags, point)["status"] == KILLED, point
        tracker = save / "latest_checkpointed_iteration.txt"
        announced = tracker.read_text() if tracker.exists() else None
        again = driver.run(module, flags)
        assert again["status"] == 0, (point, announced)
        assert state(save / "iter_0000004") == expected, point
        assert losses(save) == losses(tmp_path / "whole"), point
        assert (save / "iter_0000002").exists() == (kind != "async"), "--keep-last 1"
        assert is_clean(save), (point, sorted(path.name for path in save.iterdir()))
        shutil.rmtree(save)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", ["torch_dist", "lora"])
@pytest.mark.parametrize("where", ["data", "small file", "manifest"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    kind: str, where: str, world: Path, driver: Driver, tmp_path: Path
) -> None:
    """Loudly; and the run arrives where it would have."""
    module, flags = flags_of(kind, world, tmp_path / "run")
    assert driver.run(module, flags)["status"] == 0
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
    assert again["status"] == 0
    assert state(newest) == expected
    said = driver.said()
    assert "iter_0000004 is damaged and NOT used" in said
    assert "iter_0000002 at iteration 2" in said
    for iteration in (tmp_path / "run").glob("iter_*"):
        (iteration / names["small file"]).write_bytes(b"no more")
    assert driver.run(module, flags)["status"] == 2, "all are damaged"


def test_a_folder_belongs_to_one_run(world: Path, driver: Driver, tmp_path: Path) -> None:
    from qwen2_ascend.checkpoint.staging import FolderLock

    module, flags = flags_of("torch_dist", world, tmp_path / "run")
    lock = FolderLock(tmp_path / "run")
    lock.acquire()
    assert driver.run(module, flags)["status"] == 2
    assert "another process is writing it" in driver.said()
    lock.release()
    assert driver.run(module, flags)["status"] == 0


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["torch_dist", "lora"])
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two-renames"])
def test_the_tracked_iteration_may_be_written_again(
    kind: str,
    exchange: bool,
    world: Path,
    driver: Driver,
    tmp_path: Path,
) -> None:
    """The run goes on from iteration 2, over the iteration 4 that is there and tracked."""
    module, flags = flags_of(kind, world, tmp_path / "whole")
    assert driver.run(module, flags)["status"] == 0
    expected = state(tmp_path / "whole" / "iter_0000004")
    module, flags = flags_of(
        kind, world, tmp_path / "again", load=tmp_path / "again" / "iter_0000002"
    )
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    calls = driver.run(module, flags)["calls"]
    assert "iter_0000002 at iteration 2" in driver.said()
    points = places(calls, 13)
    assert len(points) > 2
    for point in points:
        save = tmp_path / f"killed-{point}"
        shutil.copytree(tmp_path / "whole", save)
        module, flags = flags_of(kind, world, save, load=save / "iter_0000002")
        assert driver.run(module, flags, point)["status"] == KILLED, point
        if not exchange and (partial := save / ".iter_0000004.partial").exists():
            # what a file system that cannot exchange two folders shows between two renames
            os.rename(save / "iter_0000004", save / ".iter_0000004.replaced")
            assert partial.is_dir()
        module, flags = flags_of(kind, world, save)
        assert driver.run(module, flags)["status"] == 0, point
        assert state(save / "iter_0000004") == expected, point
        shutil.rmtree(save)
