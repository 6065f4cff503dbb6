"""Headers agree with the genuine library both ways, and every damaged one is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from format_helpers import random_bytes, stored_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from qwen2_ascend.checkpoint.formats.safetensors import encode_header, read_header
from qwen2_ascend.checkpoint.formats.stored import NUMPY_DTYPES, TensorSpec
from qwen2_ascend.errors import UserError

names = st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda n: n != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
dtypes = st.sampled_from(sorted(NUMPY_DTYPES))
specs = st.dictionaries(names, st.builds(TensorSpec, shapes, dtypes), max_size=6)
metadata = st.dictionaries(names, st.text(st.characters(codec="utf-8")), max_size=3)


@settings(max_examples=200, deadline=None)
@given(specs, metadata)
def test_the_library_reads_what_we_lay_out(tmp_path_factory, tensors, metadata):
    path = tmp_path_factory.mktemp("ours") / "model.safetensors"
    header, offsets = encode_header(tensors, metadata)
    contents = bytearray(header)
    data = {name: random_bytes(spec, seed) for seed, (name, spec) in enumerate(tensors.items())}
    contents.extend(bytes(sum(spec.num_bytes for spec in tensors.values())))
    for name, offset in offsets.items():
        contents[offset : offset + len(data[name])] = data[name]
    path.write_bytes(contents)

    assert len(header) % 64 == 0
    assert all(
        offset % NUMPY_DTYPES[tensors[n].dtype].itemsize == 0 for n, offset in offsets.items()
    )
    with safe_open(path, framework="np") as file:
        assert set(file.keys()) == set(tensors)
        assert (file.metadata() or {}) == metadata
        for name, spec in tensors.items():
            array = file.get_tensor(name)
            assert (array.shape, array.dtype) == (spec.shape, NUMPY_DTYPES[spec.dtype])
            assert array.tobytes() == data[name]
    ours = read_header(path)
    assert ours.metadata == metadata
    assert {n: TensorSpec(t.shape, t.dtype) for n, t in ours.tensors.items()} == tensors
    assert {name: stored_bytes(t) for name, t in ours.tensors.items()} == data


@settings(max_examples=200, deadline=None)
@given(specs, metadata)
def test_we_read_what_the_library_writes(tmp_path_factory, tensors, metadata):
    path = tmp_path_factory.mktemp("theirs") / "model.safetensors"
    arrays = {
        name: np.frombuffer(random_bytes(spec, seed), NUMPY_DTYPES[spec.dtype]).reshape(spec.shape)
        for seed, (name, spec) in enumerate(tensors.items())
    }
    save_file(arrays, path, metadata or None)
    header = read_header(path)
    assert header.metadata == metadata
    assert {n: TensorSpec(t.shape, t.dtype) for n, t in header.tensors.items()} == tensors
    assert {n: stored_bytes(t) for n, t in header.tensors.items()} == {
        name: array.tobytes() for name, array in arrays.items()
    }
    offsets = [tensor.offset for tensor in header.tensors.values()]
    assert offsets == sorted(offsets)


def write(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape=None, dtype="F32") -> dict:
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DAMAGED = {
    "hole": ({"a": entry(0, 4), "b": entry(8, 12)}, 12, ["'b': 4 bytes between tensor 'a'"]),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, ["'b': its bytes 4..12 overlap"]),
    "starts late": ({"a": entry(4, 8)}, 8, ["4 bytes between the header"]),
    "truncated": ({"a": entry(0, 4), "b": entry(4, 12)}, 10, ["'b': truncated", "12 of 10"]),
    "longer": ({"a": entry(0, 4)}, 6, ["2 bytes follow tensor 'a'"]),
    "wrong size": ({"a": entry(0, 4, [2])}, 4, ["[2] of F32 takes 8 bytes"]),
    "negative": ({"a": entry(0, 4, [-1])}, 4, ["shape=[-1]"]),
    "fraction": ({"a": entry(0, 4, [1.0])}, 4, ["shape=[1.0]"]),
    "bool is no size": ({"a": entry(0, 4, [True])}, 4, ["shape=[true]"]),
    "many axes": ({"a": entry(0, 4, [1] * 65)}, 4, ["at most 64"]),
    "backwards": ({"a": entry(4, 0, [1])}, 4, ["data_offsets=[4, 0]"]),
    "float8": ({"a": entry(0, 4, [4], "F8_E4M3")}, 4, ["F8_E4M3", "quantized"]),
    "dtype": ({"a": entry(0, 4, [2], "I16")}, 4, ['"I16" is not one of']),
    "field": ({"a": entry(0, 4) | {"x": 1}}, 4, ["exactly dtype, shape, data_offsets"]),
    "no entry": ({"a": 3}, 0, ["exactly dtype, shape, data_offsets; found 3"]),
    "metadata": ({"__metadata__": {"k": 1}}, 0, ["__metadata__ must map strings"]),
    "metadata list": ({"__metadata__": []}, 0, ["__metadata__ is list"]),
    "two at once": (
        {"a": entry(0, 4, [-1]), "b": entry(0, 4, [9])},
        4,
        ["tensor 'a': shape=[-1]", "tensor 'b': shape=[9]"],
    ),
    "twice": (b'{"a":{},"a":{}}', 0, ["holds 'a' more than once"]),
    "space first": (b' {"a":1}', 0, ["starts with b' '"]),
    "list": (b"[]", 0, ["starts with b'['"]),
    "empty": (b"", 0, ["starts with b''"]),
    "not a number": (b'{"a":NaN}', 0, ["NaN is not a JSON number"]),
    "not utf-8": (b'{"\xff":1}', 0, ["not valid JSON"]),
    "cut": (b'{"a":', 0, ["not valid JSON"]),
    "deep": (b'{"a":' + b"[" * 200_000, 0, ["not valid JSON"]),
    "two objects": (b"{}{}", 0, ["not valid JSON"]),
    "huge number": (b'{"a":' + b"9" * 5000 + b"}", 0, [""]),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(tmp_path, case):
    header, data_bytes, expected = DAMAGED[case]
    path = write(tmp_path / "model.safetensors", header, bytes(data_bytes))
    with pytest.raises(UserError) as caught:
        read_header(path)
    assert all(str(path) in fault for fault in caught.value.faults)
    assert all(words in str(caught.value) for words in expected)


@pytest.mark.parametrize(
    ("length", "words"),
    [(100_000_001, "above the format's 100000000"), (2**64 - 1, "above"), (10, "truncated inside")],
)
def test_the_header_length_is_bounded_before_it_is_read(tmp_path, length, words):
    path = write(tmp_path / "model.safetensors", b"{}", length=length)
    with pytest.raises(UserError, match=words):
        read_header(path)


def test_files_that_are_none(tmp_path):
    (tmp_path / "short").write_bytes(b"1234567")
    for name, words in {
        "short": "too short",
        "absent": "No such file",
        "": "Is a directory",
    }.items():
        with pytest.raises(UserError, match=words):
            read_header(tmp_path / name)


def test_flips_and_cuts_never_escape_the_check(tmp_path):
    """A changed file is refused, or means another header whose ranges still fit the file."""
    tensors = {"a.weight": TensorSpec((3, 5), "bf16"), "b": TensorSpec((7,), "fp32")}
    header, _ = encode_header(tensors, {"format": "pt"})
    good = header + bytes(58)
    path = tmp_path / "model.safetensors"
    rng, refused = np.random.default_rng(0), 0
    for round_ in range(2000):
        changed = bytearray(good)
        if round_ % 4:
            changed[rng.integers(len(header))] ^= 1 << rng.integers(8)
        else:
            del changed[rng.integers(len(good)) :]
        path.write_bytes(changed)
        try:
            result = read_header(path)
        except UserError:
            refused += 1
        else:
            assert sum(t.num_bytes for t in result.tensors.values()) == 58
    assert refused > 1500
