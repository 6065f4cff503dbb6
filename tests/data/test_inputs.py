"""Reading rows: every format gives its documents, and any position can be gone on from."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from corpora import documents, write_jsonl

from qwen2_ascend.data.inputs import (
    InputFile,
    Position,
    Reading,
    Row,
    check_inputs,
    find_inputs,
    read_rows,
)
from qwen2_ascend.errors import UserError

TEXTS = documents(40, longest=30)


def reading(split_text_on: str = "file", *, keys=("text",), max_row_bytes: int = 10**6) -> Reading:
    return Reading(keys, split_text_on, max_row_bytes)


def rows_in(path: Path, split_text_on: str = "file", **more) -> list[Row]:
    """All rows of a file."""
    options = reading(split_text_on, **more)
    return [row for row, *_ in read_rows(find_inputs([str(path)]), options, Position())]


def write(path: Path, format: str) -> Path:
    """TEXTS as a file of one format; a text file holds them as paragraphs."""
    if format == "parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        table = pa.table({"id": range(len(TEXTS)), "text": TEXTS})
        pyarrow.parquet.write_table(table, path, row_group_size=7)
        return path
    if format.startswith("jsonl"):
        data = write_jsonl(path, TEXTS).read_bytes()
    else:
        data = "\n\n".join(text.replace("\n", " ").strip() for text in TEXTS).encode()
    path.write_bytes(gzip.compress(data) if format.endswith("gz") else data)
    return path


FILES = {
    "a.jsonl": ("jsonl", "file"),
    "a.jsonl.gz": ("jsonl.gz", "file"),
    "a.parquet": ("parquet", "file"),
    "a.txt": ("text", "blank-line"),
    "b.txt": ("text", "line"),
    "a.txt.gz": ("text.gz", "blank-line"),
}


def texts_of(rows) -> list[str]:
    found = []
    for row in rows:
        if row.format == "jsonl":
            found.append(json.loads(row.raw)["text"])
        else:
            raw = row.raw[0] if row.format == "parquet" else row.raw
            found.append(raw.decode())
    return found


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_its_documents(name: str, tmp_path: Path) -> None:
    format, split = FILES[name]
    rows = rows_in(write(tmp_path / name, format), split)
    expected = TEXTS
    if format.startswith("text"):
        expected = [text.replace("\n", " ").strip() for text in TEXTS]
    assert texts_of(rows) == expected


@pytest.mark.parametrize("name", FILES)
def test_goes_on_from_any_position(name: str, tmp_path: Path) -> None:
    """Property: the rows after a position are the rows that followed it the first time."""
    format, split = FILES[name]
    paths = [write(tmp_path / f"{i}{name}", format) for i in range(2)]
    files = find_inputs([str(path) for path in paths])
    everything = list(read_rows(files, reading(split), Position()))
    assert len(everything) == 2 * len(TEXTS)
    for i in range(0, len(everything), 3):
        again = list(read_rows(files, reading(split), everything[i][1]))
        assert again == everything[i + 1 :]


def test_progress_ends_at_the_size_on_disk(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, format) for name, (format, _) in FILES.items()]
    files = find_inputs([str(path) for path in paths])
    seen = [done for *_, done in read_rows(files, reading("line"), Position())]
    assert seen == sorted(seen)
    assert seen[-1] == sum(path.stat().st_size for path in paths)


def test_a_whole_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    data = b"one\r\n\r\ntwo \n\n"
    (tmp_path / "a.py").write_bytes(data)
    (row,) = rows_in(tmp_path / "a.py")
    assert (row.raw, row.number, row.where) == (data, 0, str(tmp_path / "a.py"))


def test_paragraphs_and_lines_carry_their_line_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\n\none\ntwo\n \t\n\nthree\r\n\r\nfour")
    rows = rows_in(tmp_path / "a.txt", "blank-line")
    assert [(row.number, row.raw) for row in rows] == [
        (3, b"one\ntwo"),
        (7, b"three"),
        (9, b"four"),
    ]
    rows = rows_in(tmp_path / "a.txt", "line")
    assert [(row.number, row.raw) for row in rows] == [
        (3, b"one"),
        (4, b"two"),
        (7, b"three"),
        (9, b"four"),
    ]


@pytest.mark.parametrize("split", ["file", "blank-line", "line"])
def test_rows_over_the_limit_are_marked_and_not_held(split: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 5000 + b"\n" + b"y" * 100 + b"\n\nshort")
    expected = {
        "file": [None],
        "blank-line": [None, b"short"],
        "line": [None, b"y" * 100, b"short"],
    }[split]
    assert [row.raw for row in rows_in(tmp_path / "a.txt", split, max_row_bytes=200)] == expected


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n')
    check_inputs(find_inputs([str(tmp_path / "a.jsonl")]), reading())
    rows = rows_in(tmp_path / "a.jsonl")
    assert [row.raw for row in rows] == [b'{"text": "a"}', b'{"text": "b"}']


def test_finds_files_globs_and_folders_in_order(tmp_path: Path) -> None:
    folder = str(tmp_path / "in")

    def put(*names: str) -> None:
        for name in names:
            path = tmp_path / "in" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"{}")

    put("b.jsonl", "a.jsonl", "c.txt", "notes.bin", "sub/d.jsonl.gz")

    def names(*words: str, format: str = "auto") -> list[tuple[str, str]]:
        found = find_inputs(words, format)
        return [(os.path.relpath(file.path, folder), file.format) for file in found]

    jsonl = [("a.jsonl", "jsonl"), ("b.jsonl", "jsonl")]
    known = [*jsonl, ("c.txt", "text"), ("sub/d.jsonl.gz", "jsonl")]
    assert names(folder) == known
    assert names(f"{folder}/c.txt", f"{folder}/*.jsonl") == [("c.txt", "text"), *jsonl]
    assert names(f"{folder}/notes.bin") == [("notes.bin", "text")]
    assert len(names(folder, format="text")) == 5
    hidden = ("._a.jsonl", ".ipynb_checkpoints/a.jsonl", ".cache/a/b.jsonl", "__MACOSX/a.jsonl")
    results = ("out_text_document.json", "out_text_document.idx", "out_text_document.bin")
    put(*hidden, "sub/.qwen2_ascend_cache/a.json", *results)
    assert names(folder) == known
    # hidden above the folder, or named itself, is what was asked for
    assert names(f"{folder}/.cache") == [(".cache/a/b.jsonl", "jsonl")]
    assert names(f"{folder}/._a.jsonl") == [("._a.jsonl", "jsonl")]


def test_input_faults_are_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "jsonl")
    (tmp_path / "empty").mkdir()
    words = ["nothing.jsonl", str(path), str(tmp_path / "*.jsonl"), str(tmp_path / "empty")]
    with pytest.raises(UserError) as caught:
        find_inputs(words)
    assert len(caught.value.faults) == 3
    assert "nothing.jsonl: no such file, folder or match" in caught.value.faults[0]
    assert "no file below it ends in" in caught.value.faults[1]
    assert "a.jsonl is given more than once" in caught.value.faults[2]


@pytest.mark.parametrize(
    ("name", "data", "keys", "message"),
    [
        ("a.json", b' [{"text": 1}]', ("text",), "is a JSON array"),
        ("a.json", b'{\n "text": "x"\n}', ("text",), "is one JSON object over many lines"),
        ("a.txt", b"x", ("text", "title"), "text files hold one text"),
        ("a.parquet", b"not parquet", ("text",), "is not a Parquet file"),
        ("a.jsonl.gz", b"not gzip", ("text",), "damaged or incomplete gzip"),
    ],
)
def test_files_of_the_wrong_kind_are_refused(name, data, keys, message, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        check_inputs(find_inputs([str(tmp_path / name)]), reading(keys=keys))


def test_parquet_columns_are_checked_before_reading(tmp_path: Path) -> None:
    files = find_inputs([str(write(tmp_path / "a.parquet", "parquet"))])
    with pytest.raises(UserError) as caught:
        check_inputs(files, reading(keys=("body", "id", "text")))
    assert "has no column 'body'; it has id, text" in caught.value.faults[0]
    assert "column 'id' is int64, not a string" in caught.value.faults[1]


def test_parquet_rows_hold_nulls_and_what_is_not_utf8(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    broken = pa.array([b"\xff", b"ok", None], pa.binary())
    strings = pa.StringArray.from_buffers(3, *broken.buffers()[1:], broken.buffers()[0])
    dictionary = pa.array(["x", "y", "x"]).dictionary_encode()
    pyarrow.parquet.write_table(
        pa.table({"text": strings, "title": dictionary}), tmp_path / "a.parquet"
    )
    keys = ("title", "text")
    check_inputs(find_inputs([str(tmp_path / "a.parquet")]), reading(keys=keys))
    rows = rows_in(tmp_path / "a.parquet", keys=keys)
    assert [row.raw for row in rows] == [(b"x", b"\xff"), (b"y", b"ok"), (b"x", None)]


def test_truncated_gzip_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz", "jsonl.gz")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: damaged or incomplete gzip"):
        rows_in(path)


def test_input_file_knows_a_changed_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "jsonl")
    (before,) = find_inputs([str(path)])
    os.utime(path, ns=(1, 1))
    (after,) = find_inputs([str(path)])
    assert isinstance(before, InputFile)
    assert before != after
