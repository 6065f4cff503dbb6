"""Killed at any moment, the target is the old state or the new one, and --resume finishes it.

The moments are counted, not timed: what is on the disk before each system call that changes it is
what a kill at that moment leaves (killing.py).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint.toys import (
    convert,
    load_folder,
    make_hugging_face_folder,
    toy_config,
    tp,
    tree,
)
from killing import Driver
from qwen2_ascend.checkpoint import convert as convert_module
from qwen2_ascend.checkpoint import copying, writing

CONVERT = "qwen2_ascend.checkpoint.command"
TOOL = Path(__file__).parents[2] / "tools/convert_checkpoint.py"
TRACKER = "latest_checkpointed_iteration.txt"
TENSORS = 9 + 3  # of one layer and around it, on one rank


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    refused = (CONVERT, "--load-dir=/nowhere", "--save-dir=/no", "--save-model-type=hf")
    driver = Driver(tmp_path_factory.mktemp("driver"), (CONVERT,), [refused])
    yield driver
    driver.close()


def command(source: Path, target: Path, *flags: object) -> list[object]:
    argv = ["--load-dir", source, "--save-dir", target, "--save-model-type", "mg", "--workers", 1]
    return [*argv, *tp(2), *flags]


def toy(folder: Path, seed: int = 0) -> Path:
    return make_hugging_face_folder(folder, toy_config(num_layers=1), seed=seed)


@pytest.mark.every_commit
@pytest.mark.parametrize("old", [False, True], ids=["new", "overwrite"])
def test_killed_before_every_change_of_the_disk(old, memory, driver, a_third):
    source, root = toy(memory / "hf"), memory / "root"
    flags = ["--overwrite"] if old else []
    convert(source, memory / "whole", *tp(2), "--workers", 1).require()
    new_state, old_state = tree(memory / "whole"), {}
    root.mkdir()
    if old:
        convert(toy(memory / "other", seed=1), root / "target").require()
        old_state = tree(root / "target")
    argv = command(source, root / "target", *flags)
    states = driver.states(CONVERT, argv, root, memory / "states")
    assert len(states) > TENSORS
    for left in [states[-1], *a_third(states)]:
        shutil.rmtree(root)
        shutil.copytree(left, root)
        state = tree(root / "target") if (root / "target").exists() else {}
        assert state in (old_state, new_state), f"half a state: {left}"
        if state == new_state and not (root / ".target.partial").exists():
            continue
        # the target is not there, or is to be replaced: both flags say so where both are needed
        again = [*flags, "--resume"] if state == old_state else ["--resume", "--overwrite"]
        assert driver.run(CONVERT, command(source, root / "target", *again)).status == 0, left
        assert tree(root / "target") == new_state
        assert [p.name for p in root.iterdir()] == ["target"]
    assert tree(states[0] / "target") == old_state if old else not (states[0] / "target").exists()
    assert tree(states[-1] / "target") == new_state


def test_killed_while_it_resumes(memory, driver):
    """Killed again and again, each time a bit later, until it is done."""
    source = toy(memory / "hf")
    convert(source, memory / "whole", *tp(2)).require()
    target, runs = memory / "root/target", 0
    flags: list[object] = []
    while driver.run(CONVERT, command(source, target, *flags), 12 + 3 * runs).status == -9:
        assert not target.exists()
        flags, runs = ["--resume"], runs + 1
    assert 5 < runs < 100
    assert tree(target) == tree(memory / "whole")


def test_killed_at_random_moments_with_threads(tmp_path):
    """The real command with its threads, killed from outside."""
    source = make_hugging_face_folder(tmp_path / "hf", toy_config(num_layers=24))
    argv = [str(word) for word in command(source, tmp_path / "target")]
    argv[argv.index("--workers") + 1] = "4"
    generator, killed = random.Random(0), 0
    for _ in range(4):
        process = subprocess.Popen([sys.executable, TOOL, *argv], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        journal = tmp_path / ".target.partial" / writing.JOURNAL_FILE
        while process.poll() is None and time.monotonic() < deadline and not journal.exists():
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.05))
        process.kill()
        killed += process.wait(timeout=20) == -signal.SIGKILL
        if (tmp_path / "target").exists():
            assert (tmp_path / "target" / TRACKER).exists()
            shutil.rmtree(tmp_path / "target")
        else:
            convert(source, tmp_path / "target", *tp(2), "--resume").require()
        convert(tmp_path / "target", tmp_path / "back", "--verify", to="hf").require()
        assert load_folder(tmp_path / "back") == load_folder(source)
        shutil.rmtree(tmp_path / "back")
        shutil.rmtree(tmp_path / "target")
    assert killed > 0


# -- what resuming believes


def interrupt_after(num_tensors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C when so many tensors are complete."""
    genuine, count = writing.Journal.record, 0

    def record(self, *entry, **options):
        nonlocal count
        genuine(self, *entry, **options)
        count += 1
        if count == num_tensors:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.2)

    monkeypatch.setattr(writing.Journal, "record", record)


def interrupted(tmp_path: Path, *flags: object) -> Path:
    """A partial folder with some tensors done; returns it."""
    source = toy(tmp_path / "hf")
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_after(9, monkeypatch)
        ended = convert(source, tmp_path / "target", *tp(2), "--workers", 1, *flags).require(130)
    partial = tmp_path / ".target.partial"
    assert f"what is written so far stays in {partial}" in ended.err
    assert ("--resume --overwrite" if "--overwrite" in flags else "--resume") in ended.err
    assert partial.is_dir() and not (tmp_path / ".target.lock").exists()
    return partial


def assert_is_whole(folder: Path) -> None:
    """The target is what a conversion without an interruption makes."""
    convert(folder / "hf", folder / "whole", *tp(2)).require()
    assert tree(folder / "target") == tree(folder / "whole")


def count_copies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which tensors are copied from now on."""
    copied, genuine = [], writing.write_bands

    def write_bands(write, *args):
        copied.append(f"{write.target.stored.path}: {write.target.name}")
        return genuine(write, *args)

    monkeypatch.setattr(writing, "write_bands", write_bands)
    return copied


def test_interrupted_and_resumed(tmp_path, monkeypatch):
    """Ctrl-C keeps the work and says how to go on; what is there is not copied again."""
    interrupted(tmp_path)
    source = tmp_path / "hf"
    said = convert(source, tmp_path / "target", *tp(2)).require(2).err
    assert "unfinished conversion" in said and "--resume" in said and "--overwrite" in said
    copied = count_copies(monkeypatch)
    said = convert(source, tmp_path / "target", *tp(2), "--resume").require().err
    assert "resuming: " in said and "of 20 tensors are there" in said
    assert 0 < len(copied) <= 11
    assert_is_whole(tmp_path)


def test_resuming_reads_back_and_repairs(tmp_path, monkeypatch):
    """After a loss of power the journal may claim bytes that never arrived."""
    partial = interrupted(tmp_path)
    journal = (partial / writing.JOURNAL_FILE).read_bytes().splitlines()
    path = partial / json.loads(journal[3])[0]
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 1
    raw[:64] = bytes(64)
    path.write_bytes(raw)
    copied = count_copies(monkeypatch)
    convert(tmp_path / "hf", tmp_path / "target", *tp(2), "--resume", "--verify").require()
    assert copied
    assert_is_whole(tmp_path)


@pytest.mark.parametrize("damage", ["empty", "zeros", "half a line", "noise", "gone", "files gone"])
def test_resuming_with_a_damaged_journal(damage, tmp_path):
    partial = interrupted(tmp_path)
    journal = partial / writing.JOURNAL_FILE
    raw = journal.read_bytes()
    if damage == "gone":
        journal.unlink()
        (partial / "stale").write_text("of something else")
    elif damage == "files gone":
        shutil.rmtree(partial / "iter_0000001")
    else:
        lines = raw.split(b"\n")
        noise = [lines[0], b"\x00\xff", b"[1]", b"5", b'["a", "b", "c"]', *lines[2:]]
        changed = {"empty": b"", "zeros": bytes(len(raw)), "half a line": raw[:-20]}
        journal.write_bytes(changed.get(damage, b"\n".join(noise)))
    convert(tmp_path / "hf", tmp_path / "target", *tp(2), "--resume").require()
    assert_is_whole(tmp_path)


def other_source(folder: Path) -> None:
    toy(folder / "hf", seed=3)
    os.utime(folder / "hf/model.safetensors")


OTHERS = {
    "TP": (tp(4), None),
    "format": ([*tp(2), "--save-format", "safetensors"], None),
    "dtype": ([*tp(2), "--dtype", "fp32"], None),
    "padding": ([*tp(2), "--padded-vocab-size", 128], None),
    "source": (tp(2), other_source),
    "side file": (tp(2), lambda f: (f / "hf/tokenizer.json").write_text("{}")),
}


@pytest.mark.parametrize("case", OTHERS)
def test_resuming_other_work_is_refused_and_destroys_nothing(case, tmp_path):
    flags, change = OTHERS[case]
    partial = interrupted(tmp_path)
    if change:
        change(tmp_path)
    before = tree(partial)
    said = convert(tmp_path / "hf", tmp_path / "target", *flags, "--resume").require(2).err
    assert "another source or other options" in said and "--overwrite" in said
    assert tree(partial) == before
    convert(tmp_path / "hf", tmp_path / "target", *flags, "--overwrite").require()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "target"]


def test_resuming_nothing_is_a_fresh_start(tmp_path):
    source = toy(tmp_path / "hf")
    convert(source, tmp_path / "target", *tp(2), "--resume").require()
    assert (
        "exists and is not empty"
        in convert(source, tmp_path / "target", *tp(2), "--resume").require(2).err
    )


def test_an_interrupted_replacement_goes_on_with_both_flags(tmp_path):
    convert(toy(tmp_path / "other", seed=1), tmp_path / "target").require()
    old = tree(tmp_path / "target")
    interrupted(tmp_path, "--overwrite")
    assert tree(tmp_path / "target") == old
    said = convert(tmp_path / "hf", tmp_path / "target", *tp(2), "--resume").require(2).err
    assert "besides --resume --overwrite" in said
    convert(tmp_path / "hf", tmp_path / "target", *tp(2), "--resume", "--overwrite").require()
    assert_is_whole(tmp_path)


def test_without_an_exchange_of_folders(tmp_path, monkeypatch):
    """Network file systems: the old state lies beside for a moment, and is put back if killed."""
    monkeypatch.setattr("qwen2_ascend.checkpoint.staging._exchange", lambda *_: False)
    source = toy(tmp_path / "hf")
    convert(toy(tmp_path / "other", seed=1), tmp_path / "target").require()
    old = tree(tmp_path / "target")
    convert(source, tmp_path / "target", *tp(2), "--overwrite").require()
    assert tree(tmp_path / "target") != old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "other", "target"]
    new = tree(tmp_path / "target")
    (tmp_path / "target").rename(tmp_path / ".target.replaced")  # killed between the two renames
    convert(source, tmp_path / "target", *tp(2)).require(2)
    assert tree(tmp_path / "target") == new


# -- verification


def test_verify_finds_a_flipped_bit(tmp_path, monkeypatch):
    """It may be wherever in what was written, after it was written."""
    source = toy(tmp_path / "hf")
    genuine = convert_module.verify
    for position in random.Random(0).sample(range(10_000, 50_000), 5):

        def flip_then_verify(source, written, position=position, **kwargs):
            path = written.files[-1]
            raw = bytearray(path.read_bytes())
            raw[position] ^= 1 << position % 8
            path.write_bytes(raw)
            genuine(source, written, **kwargs)

        monkeypatch.setattr(convert_module, "verify", flip_then_verify)
        flags = [*tp(2), "--save-format", "safetensors", "--verify"]
        said = convert(source, tmp_path / "target", *flags).require(1).err
        assert "1 tensors differ from the source: " in said, position
        assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_verify_finds_a_copy_that_went_elsewhere(tmp_path, monkeypatch):
    """A planted error in the copying: two rows change places."""
    genuine = copying.Reader.fill

    def fill(self, out, box, copies):
        genuine(self, out, box, copies)
        if out.shape[1] > 1:
            out[:, [0, 1]] = out[:, [1, 0]]

    source = toy(tmp_path / "hf")
    with monkeypatch.context() as patch:
        patch.setattr(copying.Reader, "fill", fill)
        convert(source, tmp_path / "wrong", *tp(2)).require()
    convert(tmp_path / "wrong", tmp_path / "back", to="hf").require()
    assert load_folder(tmp_path / "back") != load_folder(source)

    genuine_write = convert_module.write_target

    def write_target(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(copying.Reader, "fill", fill)
            return genuine_write(*args, **kwargs)

    monkeypatch.setattr(convert_module, "write_target", write_target)
    said = convert(source, tmp_path / "target", *tp(2), "--verify").require(1).err
    assert "tensors differ from the source" in said
    assert not (tmp_path / "target").exists()


def test_verify_compares_a_source_with_its_manifest(tmp_path):
    source = toy(tmp_path / "hf")
    convert(source, tmp_path / "mg", *tp(2), "--save-format", "safetensors").require()
    said = convert(tmp_path / "mg", tmp_path / "good", "--verify", to="hf").require().err
    assert "source: 20 tensors have the checksums they were written with" in said
    path = tmp_path / "mg/iter_0000001/mp_rank_01/model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 4
    path.write_bytes(raw)
    for given in ("mg", "mg/iter_0000001"):
        said = convert(tmp_path / given, tmp_path / "bad", "--verify", to="hf").require(2).err
        assert f"{path}: output_layer.weight does not have the checksum" in said
    assert not (tmp_path / "bad").exists()
    # a run that trained on and saved another iteration is not held against it
    shutil.copytree(tmp_path / "mg/iter_0000001", tmp_path / "mg/iter_0000002")
    (tmp_path / "mg" / TRACKER).write_text("2")
    convert(tmp_path / "mg", tmp_path / "good2", "--verify", to="hf").require()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tensors": 1}', '{"tensors": {"a": {"b": 1}}}'])
def test_a_damaged_manifest_is_said_to_be_one(text, tmp_path):
    source = toy(tmp_path / "hf")
    (source / "qwen2_ascend_manifest.json").write_text(text)
    ended = convert(source, tmp_path / "mg", "--verify").require(2)
    assert "qwen2_ascend_manifest.json: not a manifest" in ended.err


def test_the_manifest_says_what_is_there(tmp_path):
    source = toy(tmp_path / "hf")
    convert(source, tmp_path / "mg", *tp(2)).require()
    text = (tmp_path / "mg/qwen2_ascend_manifest.json").read_text()
    manifest = json.loads(text)
    assert str(tmp_path) not in text
    assert manifest["layout"]["tensor_model_parallel_size"] == 2
    assert manifest["source"]["files"] == {
        "model.safetensors": (source / "model.safetensors").stat().st_size
    }
    assert manifest["sizes"] == {
        str(path.relative_to(tmp_path / "mg")): path.stat().st_size
        for path in (tmp_path / "mg").rglob("*.pt")
    }
    assert {len(tensors) for tensors in manifest["tensors"].values()} == {10}
