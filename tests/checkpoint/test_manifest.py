"""What a conversion reads is held against the manifest it was written with: every kind of damage.

Damage is done to bytes, as a disk or a copy does it; nothing here uses the package to make it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoint.toys import (
    SIDE_FILES,
    convert,
    load_folder,
    make_hugging_face_folder,
    pp,
    toy_config,
    tp,
    tree,
)
from qwen2_ascend.checkpoint.manifest import MANIFEST_FILE, read_manifest
from qwen2_ascend.errors import UserError

FORMATS = {
    "pt": [*tp(2), *pp(2)],
    "virtual stages": [*pp(2), "--num-layers-per-virtual-pipeline-stage", 1],
    "safetensors": [*tp(2), "--save-format", "safetensors"],
    "torch_dist": [*tp(2), *pp(2), "--save-format", "torch_dist"],
    "hf": [],
}


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    config = toy_config(num_layers=4)
    return make_hugging_face_folder(tmp_path_factory.mktemp("source") / "hf", config)


@pytest.fixture(scope="module")
def written(hf, tmp_path_factory):
    """Our own checkpoint in each format."""
    folder = tmp_path_factory.mktemp("written")
    for name, flags in FORMATS.items():
        convert(hf, folder / name, *flags, to="hf" if name == "hf" else "mg").require()
    return folder


@pytest.fixture
def copied(written, tmp_path):
    """Copies one to be damaged."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(written / name, tmp_path / "checkpoint"))

    return copy


def read(folder: Path, *flags: object, status: int = 0) -> str:
    """Merges a checkpoint and gives what was said; nothing is left of the result."""
    target = folder.parent / "read"
    ended = convert(folder, target, *flags, to="hf").require(status)
    assert target.exists() is (status == 0)
    shutil.rmtree(target, ignore_errors=True)
    return ended.err


@contextlib.contextmanager
def flipped(path: Path, at: int, bit: int) -> Iterator[None]:
    """One bit of a file changed for a while."""
    raw = path.read_bytes()
    path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :])
    try:
        yield
    finally:
        path.write_bytes(raw)


def weight_file(folder: Path) -> Path:
    names = ("*.distcp", "*.pt", "*.safetensors")
    return next(
        path for name in names for path in sorted(folder.rglob(name)) if "common" not in str(path)
    )


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("flags", [[], ["--verify"], ["--no-check-source"]])
def test_a_sound_checkpoint_is_read_and_said_to_be_checked(name, flags, hf, written, tmp_path):
    ended = convert(written / name, tmp_path / "out", *flags, to="hf").require()
    assert load_folder(tmp_path / "out") == load_folder(hf)
    checked = re.search(r"(\d+) tensors have the checksums .* with, (\d+) files too", ended.err)
    assert (checked is None) is (flags == ["--no-check-source"])
    assert checked is None or (int(checked[1]) >= 31 and int(checked[2]) >= 8)
    assert "not verified" not in ended.err


@pytest.mark.parametrize("name", FORMATS)
def test_any_flipped_bit_of_a_tensor_is_found(name, copied):
    folder = copied(name)
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    draw = random.Random(name)
    entries = [(file, n, e) for file, ts in manifest["tensors"].items() for n, e in ts.items()]
    for file, tensor, entry in draw.sample(entries, 4):
        at = entry["offset"] + draw.randrange(2 * len(entry["shape"]))
        with flipped(folder / file, at, draw.randrange(8)):
            for flags in ([], ["--verify"]):
                said = read(folder, *flags, "--ignore-replica-mismatch", status=2)
                assert f"{folder / file}: " in said and "does not have the checksum" in said
                assert tensor.split("[")[0].split("/")[-1] in said
            read(folder, "--no-check-source", "--ignore-replica-mismatch")


def test_all_damaged_tensors_are_named_also_those_that_are_read_for_no_file(copied):
    """A norm's replica on the second rank, and a weight."""
    folder = copied("safetensors")
    manifest = json.loads((folder / MANIFEST_FILE).read_text())["tensors"]
    file = "iter_0000001/mp_rank_01/model.safetensors"
    names = ["decoder.layers.1.input_layernorm.weight", "decoder.layers.0.mlp.linear_fc2.weight"]
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(flipped(folder / file, manifest[file][name]["offset"], 3))
        said = read(folder, "--ignore-replica-mismatch", status=2)
    assert all(f"{name} does not have the checksum" in said for name in names)


def storage_keys(raw: bytes) -> list[re.Match]:
    return list(re.finditer(rb"X([\x01-\x03])\x00\x00\x00(\d+)X\x03\x00\x00\x00cpu", raw))


@pytest.mark.parametrize("flags", [[], ["--verify"]])
def test_a_storage_key_that_names_another_storage_of_equal_size(flags, copied):
    folder = copied("pt")
    path = weight_file(folder)
    raw = path.read_bytes()
    keys = [match for match in storage_keys(raw) if len(match[2]) == 1]
    names = set(json.loads((folder / MANIFEST_FILE).read_text())["tensors"])
    assert len(keys) == 10 and str(path.relative_to(folder)) in names
    refused = []
    for match in keys:
        for bit in range(4):
            with flipped(path, match.start(2), bit):
                refused.append(read(folder, *flags, status=2))
    swapped = [said for said in refused if "at byte" in said and "the manifest says" in said]
    assert len(swapped) >= 4


@pytest.mark.parametrize("name", ["pt", "torch_dist"])
def test_lengths_in_a_zips_local_headers(name, copied):
    """Another length of the extra field would move the data: always refused, or read as it was."""
    folder = copied(name)
    path = weight_file(folder)
    raw = path.read_bytes()
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    tensors = manifest["tensors"][str(path.relative_to(folder))].values()
    first = min(entry["offset"] for entry in tensors) - 800  # before, objects that nothing reads
    headers = [m.start() for m in re.finditer(rb"PK\x03\x04", raw) if m.start() > first]
    draw = random.Random(0)
    for header in draw.sample(headers, 4):
        (name_bytes,) = struct.unpack_from("<H", raw, header + 26)
        for at in (*range(header + 26, header + 30), header + 30 + name_bytes - 1):
            for bit in draw.sample(range(8), 2):
                with flipped(path, at, bit):
                    assert str(path) in read(folder, status=2)


def test_names_of_files_in_the_metadata(copied):
    folder = copied("torch_dist")
    path = folder / "iter_0000001/.metadata"
    places = [m.start() for m in re.finditer(rb"__\d_0\.distcp", path.read_bytes())]
    for place in places[::6]:
        with flipped(path, place + 2, 0):
            read(folder, status=2)


@pytest.mark.parametrize("name", ["pt", "hf"])
def test_configs_and_tokenizers_are_checked(name, copied):
    folder, draw = copied(name), random.Random(0)
    for file in ("config.json", *SIDE_FILES):
        size = (folder / file).stat().st_size
        with flipped(folder / file, draw.randrange(size), draw.randrange(7)):
            for flags in ([], ["--verify"]):
                said = read(folder, *flags, status=2)
                assert file.split(".")[0].split("/")[0] in said
    for file in SIDE_FILES:
        raw = (folder / file).read_bytes()
        (folder / file).unlink()
        assert f"{folder / file}: is missing, but was written" in read(folder, status=2)
        (folder / file).write_bytes(raw)
    read(folder)


def test_small_files_of_a_torch_dist_folder_are_checked(copied):
    folder = copied("torch_dist")
    path = folder / "iter_0000001/common.pt"
    at = path.read_bytes().index(b"rotary_base")  # an argument's value, which nothing here reads
    with flipped(path, at + len("rotary_base") + 3, 0):
        assert "common.pt" in read(folder, status=2)


def test_who_changed_a_config_on_purpose_says_so(copied):
    folder = copied("pt")
    (folder / "generation_config.json").write_text("{}")
    (folder / "chat_template.json").write_text("{}")
    said = read(folder, status=2)
    assert f"If you changed it, name its folder: --hf-cfg-dir {folder}" in said
    said = read(folder, "--hf-cfg-dir", folder, "--verify")
    assert "tensors have the checksums" in said


def test_an_added_file_is_said_not_to_be_verified(copied):
    folder = copied("pt")
    (folder / "chat_template.json").write_text("{}")
    assert "does not list chat_template.json; that is not verified" in read(folder)


# -- the manifest itself


@pytest.mark.parametrize("name", FORMATS)
def test_a_lost_manifest_is_missed(name, copied):
    folder = copied(name)
    (folder / MANIFEST_FILE).unlink()
    for flags in ([], ["--verify"]):
        assert f"its {MANIFEST_FILE}, which was written with it, is missing" in read(folder, *flags)
    assert "is missing" not in read(folder, "--no-check-source")


def test_other_peoples_folders_miss_nothing(hf, tmp_path):
    assert "not verified" not in convert(hf, tmp_path / "a").require().err
    said = convert(hf, tmp_path / "b", "--verify").require().err
    assert "it has no manifest; whether its bytes are as they were written is not verified" in said


def test_an_emptied_manifest_is_none(copied):
    folder = copied("pt")
    raw = json.loads((folder / MANIFEST_FILE).read_text())
    for edit in ({"tensors": {}}, {"tensors": dict(list(raw["tensors"].items())[1:])}):
        (folder / MANIFEST_FILE).write_text(json.dumps(raw | edit))
        assert "it lists no tensor of iter_0000001/mp_rank_00" in read(folder, status=2)
    file = next(iter(raw["tensors"]))
    lost = raw["tensors"][file].pop(next(iter(raw["tensors"][file])))
    assert lost
    (folder / MANIFEST_FILE).write_text(json.dumps(raw))
    assert "which the manifest does not list there" in read(folder, status=2)


def test_a_manifest_of_an_earlier_release_is_read(copied):
    folder = copied("pt")
    raw = json.loads((folder / MANIFEST_FILE).read_text())
    del raw["files"]
    (folder / MANIFEST_FILE).write_text(json.dumps(raw | {"manifest_version": 1}))
    said = read(folder, "--verify")
    assert "lists no config and tokenizer files; that is not verified" in said
    assert "tensors have the checksums" in said
    (folder / MANIFEST_FILE).write_text(json.dumps(raw | {"manifest_version": 3}))
    assert "manifest_version=3 is of a newer release" in read(folder, status=2)


def test_a_later_iteration_in_the_same_folder_is_said_not_to_be_verified(copied):
    """A training run that went on has other weights and its own side files."""
    folder = copied("pt")
    shutil.copytree(folder / "iter_0000001", folder / "iter_0000002")
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    (folder / "generation_config.json").write_text("{}")
    said = read(folder, "--verify")
    assert re.search(r"its manifest lists nothing of \d+ tensors; that is not verified", said)


def test_weights_that_a_training_run_put_in_their_place_are_not_held_against_it(copied):
    """It saved its first iteration into the folder that it was loaded from."""
    folder = copied("pt")
    for path in folder.rglob("*.pt"):
        state = torch.load(path, weights_only=False)
        del state["args"].qwen2_ascend_manifest
        state["model"]["decoder.layers.0.mlp.linear_fc2.weight"] += 1
        torch.save(state | {"optimizer": {"m": torch.ones(5)}}, path)
    said = read(folder, "--verify")
    assert "its manifest is of other weights, which were replaced; that is not verified" in said


def test_the_manifest_of_a_folder_that_was_moved(copied, tmp_path, monkeypatch):
    folder = copied("pt")
    folder.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved/iter_0000001")
    ended = convert(Path("."), tmp_path / "out", "--hf-cfg-dir", "..", to="hf").require()
    assert "tensors have the checksums" in ended.err


def test_verify_and_not_checking_contradict_each_other(copied):
    assert "leave out --no-check-source" in read(
        copied("pt"), "--verify", "--no-check-source", status=2
    )


def test_a_dry_run_checks_what_headers_say(copied):
    folder = copied("pt")
    path = weight_file(folder)
    with flipped(path, storage_keys(path.read_bytes())[1].start(2), 2):
        assert "the manifest says" in read(folder, "--dry-run", status=2)


def every_place(value: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from every_place(inner, (*path, key))


def replaced(value: Any, path: tuple, new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.just(2**63),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(["bf16", "..", "/etc/passwd", "a/../b", "0" * 32, "a\0b", "a\x1b[2J\n"]),
    ),
    lambda child: st.one_of(
        st.lists(child, max_size=3), st.dictionaries(st.text(max_size=4), child, max_size=3)
    ),
    max_leaves=6,
)


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_json_value_at_any_place_is_accepted_or_refused(data, written, tmp_path):
    """No other exception comes, and no path leads out."""
    raw = json.loads((written / "pt" / MANIFEST_FILE).read_text())
    for file in raw["tensors"]:  # two tensors of each, or most places would be theirs
        raw["tensors"][file] = dict(list(raw["tensors"][file].items())[:2])
    place = data.draw(st.sampled_from(list(every_place(raw))))
    path = tmp_path / MANIFEST_FILE
    path.write_text(json.dumps(replaced(raw, place, data.draw(json_values))))
    try:
        manifest = read_manifest(path)
    except UserError as error:
        assert all(fault.startswith(str(path)) and fault.isprintable() for fault in error.faults)
    else:
        files = [*manifest.tensors, *manifest.sizes, *(manifest.files or {})]
        assert all(os.path.realpath(tmp_path / file).startswith(str(tmp_path)) for file in files)


def test_nothing_of_a_source_is_changed_by_checking_it(copied):
    folder = copied("torch_dist")
    before = tree(folder)
    read(folder, "--verify")
    assert tree(folder) == before
