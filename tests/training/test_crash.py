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

from helpers import make_tiny_hugging_face_folder, tiny_config

SEED = int(os.environ.get("QWEN2_CRASH_SEED", "0"))
ALL = os.environ.get("QWEN2_CRASH_POINTS") == "all"
KILLED = -9
PRETRAIN, FINETUNE = "qwen2_ascend.training.pretrain", "qwen2_ascend.finetuning.finetune"
COMMON = (
    "--seq-length 16 --global-batch-size 2 --train-iters 4 --lr 1e-3 --save-interval 2 "
    "--device cpu --no-log-energy"
)
KINDS = {
    "torch_dist": (PRETRAIN, "--mock-data"),
    "torch": (PRETRAIN, "--mock-data --ckpt-format torch --bf16"),
    "async": (PRETRAIN, "--mock-data --async-save --keep-last 1"),
    "lora": (FINETUNE, "--data-path {d}/chats.jsonl --lora-r 2 --lora-alpha 4"),
}


class Driver:
    """The process that runs and kills launchers."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("crash_driver.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def run(self, module: str, flags: str, point: int | None = None) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"module": module, "argv": flags.split(), "point": point}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    started = Driver()
    yield started
    started.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crash")
    make_tiny_hugging_face_folder(folder / "hf", tiny_config(tie_word_embeddings=True))
    rows = [{"messages": [message("user", i), message("assistant", i + 1)]} for i in range(16)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def message(role: str, number: int) -> dict[str, str]:
    return {"role": role, "content": f"{number} " * 2}


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
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on(kind: str, world: Path, driver: Driver, tmp_path: Path) -> None:
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
        assert is_clean(save), (point, sorted(path.name for path in save.iterdir()))
        shutil.rmtree(save)


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
    """From iteration 2 on, over the iteration 4 that is there and tracked."""
    module, flags = flags_of(kind, world, tmp_path / "whole")
    assert driver.run(module, flags)["status"] == 0
    expected = state(tmp_path / "whole" / "iter_0000004")
    module, flags = flags_of(
        kind, world, tmp_path / "again", load=tmp_path / "again" / "iter_0000002"
    )
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    calls = driver.run(module, flags)["calls"]
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
