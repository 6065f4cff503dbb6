"""Dumps of every format are read by name, and nothing in them is executed."""

from __future__ import annotations

import argparse
import os
import pickle
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qwen2_ascend.comparison.dumps import open_dump, open_dumps
from qwen2_ascend.errors import UserError

VALUES = {
    "a.bf16": torch.linspace(-3, 3, 12).reshape(3, 4).bfloat16(),
    "b.fp32": torch.linspace(0, 1, 5),
    "c.ids": torch.arange(6).reshape(2, 3),
    "d.empty": torch.zeros(0, 3),
}
DTYPES = {"a.bf16": "bf16", "b.fp32": "fp32", "c.ids": "int64", "d.empty": "fp32"}


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    is_bf16 = tensor.dtype == torch.bfloat16
    return tensor.float().numpy().astype(ml_dtypes.bfloat16) if is_bf16 else tensor.numpy()


def save(path: Path, tensors: dict[str, torch.Tensor] = VALUES) -> Path:
    arrays = {name: as_numpy(tensor) for name, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    elif path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".pt":
        torch.save(tensors, path)
    else:
        path.mkdir()
        for name, array in arrays.items():
            np.save(path / f"{name}.npy", array)
    return path


@pytest.mark.parametrize("kind", ["x.safetensors", "x.npz", "x.pt", "folder"])
def test_every_format_gives_the_same_arrays_by_the_same_names(tmp_path, kind) -> None:
    arrays = open_dump(save(tmp_path / kind)).by_short_name()
    assert arrays is not None and sorted(arrays) == sorted(VALUES)
    for name, tensor in VALUES.items():
        stored, expected = arrays[name], as_numpy(tensor)
        assert stored.load is not None
        loaded = stored.load()
        assert (stored.shape, stored.dtype) == (expected.shape, DTYPES[name])
        assert loaded.dtype == expected.dtype
        np.testing.assert_array_equal(loaded.astype("f8"), expected.astype("f8"))


def test_a_pt_of_containers_is_flattened_by_dots(tmp_path) -> None:
    """Strided views, parameters, numbers and Megatron's arguments are what real dumps hold."""
    weight = torch.arange(6.0).reshape(2, 3)
    torch.save(
        {
            "model": OrderedDict(weight=torch.nn.Parameter(weight), turned=weight.T),
            "args": argparse.Namespace(lr=1.0),
            "losses": [2.5, 2.25],
            "step": 7,
            3: (weight[:, 1],),
            "name": "run",
            "none": None,
            "huge": 10**30,
            "scalar": torch.tensor(4.0),
        },
        tmp_path / "x.pt",
    )
    arrays = open_dump(tmp_path / "x.pt").by_full_name()
    names = "model.weight model.turned losses.0 losses.1 step 3.0 huge scalar"
    assert list(arrays) == names.split()
    assert arrays["huge"].load is None
    loaded = {name: a.load() for name, a in arrays.items() if a.load is not None}
    np.testing.assert_array_equal(loaded["model.turned"], weight.T)
    np.testing.assert_array_equal(loaded["3.0"], [1, 4])
    assert (loaded["losses.1"], loaded["step"], loaded["scalar"]) == (2.25, 7, 4)


def test_one_bare_array_is_named_by_its_file(tmp_path) -> None:
    np.save(tmp_path / "logits.npy", np.float32(3))
    torch.save(torch.zeros(2), tmp_path / "hidden.pt")
    torch.save(torch.ones(2), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for file in tmp_path.iterdir():
        assert list(open_dump(file).by_full_name()) == [file.stem]
    assert list(open_dump(tmp_path).by_full_name()) == ["hidden", "logits", "old"]


def test_a_folders_files_in_the_order_of_their_numbers(tmp_path) -> None:
    for name in ["l10", "l9", "sub/l1"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.savez(tmp_path / f"{name}.npz", out=np.zeros(1))
    (tmp_path / ".hidden.npy").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no dump")
    dump = open_dump(tmp_path)
    assert dump.by_short_name() is None
    assert list(dump.by_full_name()) == ["l9/out", "l10/out", "sub/l1/out"]


def test_other_ways_of_storing_the_same_numbers(tmp_path) -> None:
    """Big-endian, Fortran order, compressed: the values count."""
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.save(tmp_path / "big.npy", values.astype(">f4"))
    np.save(tmp_path / "fortran.npy", np.asfortranarray(values))
    np.savez_compressed(tmp_path / "packed.npz", packed=values)
    for name, stored in open_dump(tmp_path).by_full_name().items():
        assert stored.dtype == "fp32", name
        assert stored.load is not None
        assert stored.load().dtype == np.float32
        np.testing.assert_array_equal(stored.load(), values)


def test_dtypes_that_are_not_compared_have_no_data(tmp_path) -> None:
    np.save(tmp_path / "complex.npy", np.zeros(2, complex))
    np.save(tmp_path / "text.npy", np.array(["a", "b"]))
    torch.save(
        {
            "fp8": torch.zeros(2).to(torch.float8_e4m3fn),
            "sparse": torch.eye(2).to_sparse(),
            "complex": torch.zeros(2, dtype=torch.complex64),
        },
        tmp_path / "odd.pt",
    )
    found = {name: (s.dtype, s.load) for name, s in open_dump(tmp_path).by_full_name().items()}
    assert found == {
        "complex": ("complex128", None),
        "text": ("<U1", None),
        "odd/fp8": ("float8_e4m3fn", None),
        "odd/sparse": ("float32, sparse_coo", None),
        "odd/complex": ("complex64", None),
    }


# -- mistakes and damage


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def pickled(path: Path) -> Path:
    payload = Payload()
    if path.suffix == ".npy":
        np.save(path, np.array([payload], dtype=object), allow_pickle=True)
    elif path.suffix == ".npz":
        np.savez(path, x=np.array([payload], dtype=object))
    elif path.stem == "bare":
        path.write_bytes(pickle.dumps(payload))
    else:
        torch.save({"x": torch.zeros(1), "payload": payload}, path)
    return path


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.pt", "bare.pt", "bare.npy.pt"])
def test_nothing_is_unpickled(tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    path = pickled(tmp_path / name)
    with pytest.raises(UserError, match=r"objects|refused, not executed|not a readable") as caught:
        open_dump(path)
    assert str(path) in str(caught.value)
    is_named = "asks for posix.mkdir; refused" in str(caught.value)
    assert is_named == (name in ("x.pt", "bare.npy.pt"))
    assert not Path("executed").exists()


@pytest.mark.parametrize("kind", ["x.safetensors", "x.npz", "x.pt", "x.npy"])
@pytest.mark.parametrize("damage", ["empty", "truncated", "garbage", "header"])
def test_a_damaged_file_is_named(tmp_path, kind, damage) -> None:
    path = tmp_path / kind
    if kind == "x.npy":
        np.save(path, np.zeros(1000))
    else:
        save(path)
    data = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "truncated": data[: len(data) // 2],
            "garbage": b"\x93garbage" * 50,
            "header": data[:9] + b"\xff" * 16 + data[25:],
        }[damage]
    )
    try:
        arrays = open_dump(path).arrays
    except UserError as error:
        assert str(path) in str(error)
    else:  # a zip's first header is a copy that few readers look at
        assert (damage, path.suffix) in {("header", ".npz"), ("header", ".pt")}
        assert len(arrays) == len(VALUES)


@pytest.mark.parametrize("kind", ["x.safetensors", "x.npz", "x.pt", "old.pth", "x.npy"])
def test_whatever_is_damaged_it_is_read_or_refused(tmp_path, kind) -> None:
    """Property: no flip of bits gives anything but arrays or an error that names the file."""
    path = tmp_path / kind
    if kind == "x.npy":
        np.save(path, np.zeros((3, 4)))
    elif kind == "old.pth":
        torch.save(VALUES, path, _use_new_zipfile_serialization=False)
    else:
        save(path)
    data, random = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for flips in [1, 3, 20] * 20:
        damaged = bytearray(data)
        for place in random.integers(0, len(data), flips):
            damaged[place] = random.integers(0, 256)
        path.write_bytes(damaged)
        try:
            for stored in open_dump(path).arrays:
                if stored.load is not None:
                    stored.load()
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 10


def test_damage_that_only_the_data_shows_is_named_when_it_is_read(tmp_path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, x=np.random.default_rng(0).standard_normal(5000))
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("x.npy").header_offset
    data = bytearray(path.read_bytes())
    data[start + 20000 : start + 20100] = b"\xff" * 100
    path.write_bytes(data)
    (stored,) = open_dump(path).arrays
    assert stored.load is not None
    with pytest.raises(UserError, match=r"x\.npz: not a readable array 'x'"):
        stored.load()


def test_all_mistakes_at_once(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name in ["1.npy", "2.safetensors"]:
        (tmp_path / "a" / name).write_bytes(b"no")
    np.save(tmp_path / "b" / "x.npy", np.zeros(1))
    torch.save(torch.zeros(1), tmp_path / "b" / "x.pt")
    with pytest.raises(UserError) as caught:
        open_dumps(tmp_path / "a", tmp_path / "b")
    assert len(caught.value.faults) == 3
    assert "both hold 'x'" in caught.value.faults[2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.npy", "no such file or folder"),
        ("notes.txt", "not a dump; name a file of .npy, .npz, .pt"),
        ("nothing", "holds no dump"),
        ("strings.pt", "holds no arrays"),
    ],
)
def test_what_is_no_dump(tmp_path, name, message) -> None:
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "nothing").mkdir()
    torch.save({"a": "b"}, tmp_path / "strings.pt")
    with pytest.raises(UserError, match=message):
        open_dump(tmp_path / name)


def bomb(path: Path, data_pkl: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", data_pkl)
        file.writestr("x/version", "3\n")
    return path


def references(levels: int, leaf: bytes = b"") -> bytes:
    """A list in a list, and nine references to it beside it, and so on."""
    inner = b"](" + leaf + b"eq\0"
    for i in range(levels):
        inner = b"](" + inner + (b"h" + bytes([i])) * 9 + b"eq" + bytes([i + 1])
    return b"\x80\x02" + inner + b"."


@pytest.mark.parametrize("leaf", [b"", b"K\1"])
def test_a_list_that_is_met_ten_times_ten_times_over(tmp_path, leaf) -> None:
    path = bomb(tmp_path / "x.pt", references(9, leaf))
    assert path.stat().st_size < 700
    started = time.process_time()
    with pytest.raises(UserError, match="holds more than 200000 values"):
        open_dump(path)
    assert time.process_time() - started < 3
    few = open_dump(bomb(tmp_path / "few.pt", references(3, b"K\1")))
    assert len(few.arrays) == 1000


def test_a_pickle_that_makes_more_than_its_size_allows(tmp_path) -> None:
    sets = b"\x80\x04(" + b"\x8f" * 1_000_000 + b"t."
    (tmp_path / "bare.pt").write_bytes(b"\x80\x02K\1." + sets)  # as torch before 1.6
    for path in (bomb(tmp_path / "zip.pt", sets), tmp_path / "bare.pt"):
        with pytest.raises(UserError, match="far more objects than a file of its size"):
            open_dump(path)


def test_fifos_are_refused(tmp_path) -> None:
    for suffix in (".npy", ".npz", ".pt", ".safetensors"):
        os.mkfifo(tmp_path / f"x{suffix}")
        with pytest.raises(UserError, match="a FIFO, not a regular file"):
            open_dump(tmp_path / f"x{suffix}")
