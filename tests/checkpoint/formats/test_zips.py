"""Our zips are, byte for byte, what torch's own writer writes without CRCs."""

import io
import zipfile

import pytest
import torch
from format_helpers import write_layout
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2_ascend.checkpoint.formats.zips import Record, ZipFault, layout_zip, read_zip

names = st.text("abcdefé._0123", min_size=1, max_size=80).map(lambda name: f"archive/data/{name}")
contents = st.one_of(st.binary(max_size=200), st.integers(0, 300))


def torch_zip(records, path):
    """What torch's writer makes of `records`, with holes where only a size is given."""
    writer = torch._C.PyTorchFileWriter(str(path), False, 64)
    for name, content in records.items():
        name = name.removeprefix("archive/")
        if isinstance(content, int):
            writer.write_record_metadata(name, content)
        else:
            writer.write_record(name, content, len(content))
    writer.write_end_of_file()


def with_torch_tail(records, path):
    """`records` and those that torch's writer adds by itself, as it wrote them to `path`."""
    reader = torch._C.PyTorchFileReader(str(path))
    names = [f"archive/{name}" for name in reader.get_all_records()]
    added = names[len(records) :]
    assert added == ["archive/version", "archive/byteorder", "archive/.data/serialization_id"]
    tail = {name: reader.get_record(name.removeprefix("archive/")) for name in added}
    return {**records, **tail}


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(names, contents, min_size=1, max_size=8))
def test_bytes_are_those_of_torch(tmp_path_factory, records):
    folder = tmp_path_factory.mktemp("zip")
    torch_zip(records, folder / "archive.pt")
    records = with_torch_tail(records, folder / "archive.pt")
    layout = layout_zip(records)
    ours = write_layout(layout, folder / "ours")
    theirs = (folder / "archive.pt").read_bytes()
    assert ours.read_bytes() == theirs
    assert all(offset % 64 == 0 for offset in layout.offsets.values())
    with ours.open("rb") as file:
        found = read_zip(file, 0, layout.total_bytes)
    sizes = {n: c if isinstance(c, int) else len(c) for n, c in records.items()}
    assert found == {name: Record(layout.offsets[name], sizes[name]) for name in records}


@pytest.mark.parametrize(
    "sizes",
    [
        [2**32 - 2, 5, 100],
        [2**32 - 1, 100],
        [2**32 + 12, 0, 100],
        # directory offsets just below, at and above what 32 bits hold
        *([2**32 - 64 * k, 1] for k in range(1, 12)),
    ],
    ids=lambda sizes: "-".join(map(str, sizes)),
)
def test_zip64_is_used_where_torch_does(tmp_path, sizes):
    """Files over 4 GiB, sparse: all that is written of them is equal, the rest are holes."""
    records = {"archive/data.pkl": b"skeleton"}
    records |= {f"archive/data/{i}": size for i, size in enumerate(sizes)}
    torch_zip(records, tmp_path / "archive.pt")
    records = with_torch_tail(records, tmp_path / "archive.pt")
    layout = layout_zip(records)
    with (tmp_path / "archive.pt").open("rb") as file:
        assert file.seek(0, 2) == layout.total_bytes
        for offset, data in layout.segments:
            file.seek(offset)
            assert file.read(len(data)) == data
        found = read_zip(file, 0, layout.total_bytes)
    assert {name: record.offset for name, record in found.items()} == layout.offsets
    assert [found[f"archive/data/{i}"].num_bytes for i in range(len(sizes))] == sizes
    assert sum(len(d) for _, d in layout.segments) + sum(sizes) == layout.total_bytes


def test_a_zip_inside_a_file_is_found_where_it_lies(tmp_path):
    layout = layout_zip({"archive/a": b"first", "archive/b": b""})
    inner = write_layout(layout, tmp_path / "zip").read_bytes()
    file = io.BytesIO(b"x" * 1000 + inner + b"y" * 10)
    records = read_zip(file, 1000, len(inner))
    assert records["archive/a"] == Record(1000 + layout.offsets["archive/a"], 5)


def python_zip(compression=zipfile.ZIP_STORED, comment=b"", twice=False) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("archive/data.pkl", b"0" * 50)
        if twice:
            with pytest.warns(UserWarning, match="Duplicate name"):
                file.writestr("archive/data.pkl", b"1" * 50)
        file.comment = comment
    return buffer.getvalue()


def overlapping() -> bytes:
    """A zip whose record `a` holds another record `b`, header and all, listed in the directory."""
    inner, outer = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(inner, "w") as file:
        file.writestr("b", b"hidden")
        hidden = file.getinfo("b")
    with zipfile.ZipFile(outer, "w") as file:
        file.writestr("a", inner.getvalue())
        hidden.header_offset = 30 + len("a")
        file.filelist.append(hidden)
    return outer.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"PK", "too few"),
        (python_zip()[:-1], "truncated"),
        (python_zip()[1:], "not where its end says"),
        (python_zip(zipfile.ZIP_DEFLATED), "compressed records"),
        (python_zip(comment=b"hello"), "does not end as a zip does"),
        (python_zip(twice=True), "twice"),
        (python_zip().replace(b"data.pkl", b"data.pk1", 1), "contradicts the directory"),
        (overlapping(), "overlapping records 'a' and 'b'"),
    ],
)
def test_what_torch_never_writes_is_refused(data, words):
    with pytest.raises(ZipFault, match=words):
        read_zip(io.BytesIO(data), 0, len(data))


def test_stored_zips_of_other_writers_are_read():
    data = python_zip()
    record = read_zip(io.BytesIO(data), 0, len(data))["archive/data.pkl"]
    assert data[record.offset :][: record.num_bytes] == b"0" * 50


@pytest.fixture(scope="module")
def torch_saved(tmp_path_factory):
    """torch.save's own zip with checksums, and ours without."""
    folder = tmp_path_factory.mktemp("flips")
    torch.save({"a": torch.arange(40), "b": torch.ones(3)}, folder / "torch.pt")
    records = {"x/data.pkl": b"pickle", "x/data/0": 100, "x/data/1": 0, "x/version": b"3\n"}
    write_layout(layout_zip(records), folder / "ours.pt")
    return {name: (folder / f"{name}.pt").read_bytes() for name in ("torch", "ours")}


def places(records):
    return {name: (record.offset, record.num_bytes) for name, record in records.items()}


@pytest.mark.parametrize("name", ["torch", "ours"])
def test_no_flipped_bit_moves_a_record(name, torch_saved):
    """Whatever bit of the container is flipped: it is refused, or says what it said before."""
    data = bytearray(torch_saved[name])
    good = read_zip(io.BytesIO(data), 0, len(data))
    inside = {at for r in good.values() for at in range(r.offset, r.offset + r.num_bytes)}
    found = {"refused": 0, "equal": 0}
    for at in sorted(set(range(len(data))) - inside):
        for bit in range(8):
            data[at] ^= 1 << bit
            try:
                records = read_zip(io.BytesIO(data), 0, len(data))
            except ZipFault:
                found["refused"] += 1
            else:
                assert places(records) == places(good), (at, bit)
                found["equal"] += 1
            data[at] ^= 1 << bit
    assert found["refused"] > 1000, found  # times, versions and padding may be anything
