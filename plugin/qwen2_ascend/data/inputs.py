"""The rows of text, JSONL and Parquet files, in order, from any position on.

Rows are handed out raw: decoding, JSON and tokenizing are the workers' (`tokenization.py`). Every
row comes with the position behind it, which is all that is needed to go on from there later.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.files import json_value, open_regular, require_regular

JSONL_SUFFIXES = (".jsonl", ".json", ".ndjson", ".jl")
KNOWN_SUFFIXES = (*JSONL_SUFFIXES, ".txt", ".text", ".parquet")
BOM = b"\xef\xbb\xbf"


class InputFile(NamedTuple):
    """One file to read, with what tells whether it is still the same when a run is resumed."""

    path: str
    format: str
    """text, jsonl or parquet."""
    size: int
    """Bytes on disk."""
    mtime_ns: int

    @property
    def is_gzip(self) -> bool:
        return self.path.endswith(".gz")


class Row(NamedTuple):
    """One document as it lies in its file."""

    path: str
    number: int
    """Line (or Parquet row), from 1; 0 where the whole file is the document."""
    format: str
    raw: Any
    """bytes; for Parquet bytes or None for each key; None when longer than what is allowed."""

    @property
    def num_bytes(self) -> int:
        parts = self.raw if isinstance(self.raw, tuple) else (self.raw,)
        return sum(len(part) for part in parts if part is not None)

    @property
    def where(self) -> str:
        return f"{self.path}:{self.number}" if self.number else self.path


class Position(NamedTuple):
    """Where the next row starts."""

    file: int = 0
    offset: int = 0
    """Bytes into the (uncompressed) file, or Parquet rows."""
    line: int = 0
    """Lines before it in the file."""


class Reading(NamedTuple):
    """How rows are cut out of files."""

    keys: tuple[str, ...]
    split_text_on: str
    """file, blank-line or line."""
    max_row_bytes: int


def find_inputs(words: Sequence[str], input_format: str = "auto") -> list[InputFile]:
    """Expands files, globs and folders; the order given, each expansion sorted.

    A folder gives the files below it with a known suffix, or all of them when the format is told;
    hidden ones never.

    Raises:
        UserError: nothing there, an unreadable file, or one that is given twice.
    """
    faults: list[str] = []
    paths: list[str] = []
    for word in words:
        found = _expand(word, input_format)
        if not found:
            faults.append(f"--input {word}: {_nothing_found(word)}")
        paths += found
    twice = [path for path, count in Counter(map(os.path.realpath, paths)).items() if count > 1]
    faults += [f"--input: {path} is given more than once." for path in twice]
    faults += [f"{path}: cannot be read." for path in paths if not os.access(path, os.R_OK)]
    raise_if(faults)
    files = []
    for path in paths:
        stat = os.stat(path)
        kind = _format_of(path) if input_format == "auto" else input_format
        files.append(InputFile(path, kind, stat.st_size, stat.st_mtime_ns))
    return files


def _expand(word: str, input_format: str) -> list[str]:
    if os.path.isdir(word):
        below = sorted(str(path) for path in Path(word).rglob("*") if _is_seen(path, word))
        return [p for p in below if input_format != "auto" or _name(p).endswith(KNOWN_SUFFIXES)]
    if os.path.exists(word):
        return [word]
    return sorted(path for path in glob.glob(word, recursive=True) if os.path.isfile(path))


def _is_seen(path: Path, folder: str) -> bool:
    """Whether a file below a folder is its user's.

    Copies, caches and marks have hidden names; what an earlier run has said lies beside its index.
    """
    parts = path.relative_to(folder).parts
    is_hidden = any(part.startswith((".", "__MACOSX")) for part in parts)
    is_result = path.suffix == ".json" and path.with_suffix(".idx").exists()
    return path.is_file() and not is_hidden and not is_result


def _nothing_found(word: str) -> str:
    if os.path.isdir(word):
        known = " ".join(KNOWN_SUFFIXES)
        return f"no file below it ends in {known} (or .gz of these); say --input-format to take all"
    return "no such file, folder or match"


def _name(path: str) -> str:
    return path.removesuffix(".gz").lower()


def _format_of(path: str) -> str:
    if _name(path).endswith(".parquet"):
        return "parquet"
    return "jsonl" if _name(path).endswith(JSONL_SUFFIXES) else "text"


def check_inputs(files: Sequence[InputFile], reading: Reading) -> None:
    """Finds what can be found without reading all: wrong formats and missing Parquet columns.

    Raises:
        UserError: with every fault.
    """
    faults = []
    if len(reading.keys) > 1 and any(file.format == "text" for file in files):
        faults.append(
            f"--json-keys {' '.join(reading.keys)}: text files hold one text; give one key."
        )
    for file in files:
        if file.format == "parquet":
            faults += _parquet_faults(file, reading.keys)
        elif file.format == "jsonl":
            with damaged_gzip(file):
                faults += _jsonl_faults(file)
    raise_if(faults)


def _jsonl_faults(file: InputFile) -> list[str]:
    with opened(file) as stream:
        start = stream.read(4096).removeprefix(BOM).lstrip()
    if start.startswith(b"["):
        return [f"{file.path}: is a JSON array; one JSON object on each line is needed (JSONL)."]
    if start.startswith((b"{\n", b"{\r")) and not _is_json(start.splitlines()[0]):
        return [f"{file.path}: is one JSON object over many lines; JSONL has one on each line."]
    return []


def _is_json(line: bytes) -> bool:
    try:
        json_value(line)
    except ValueError:
        return False
    return True


def _parquet_faults(file: InputFile, keys: Sequence[str]) -> list[str]:
    import pyarrow as pa

    try:
        schema = parquet_file(file.path).schema_arrow
    except pa.ArrowInvalid as error:
        return [f"{file.path}: is not a Parquet file: {' '.join(str(error).split())}"]
    faults = []
    for key in keys:
        if key not in schema.names:
            faults.append(f"{file.path}: has no column {key!r}; it has {', '.join(schema.names)}.")
            continue
        kind = schema.field(key).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            faults.append(f"{file.path}: column {key!r} is {kind}, not a string.")
    return faults


def parquet_file(path: str) -> Any:
    """pyarrow's ParquetFile.

    Raises:
        UserError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UserError(
            f"{path}: Parquet needs pyarrow; install it with pip install 'qwen2-ascend[data]'."
        ) from None
    require_regular(path)
    return pyarrow.parquet.ParquetFile(path)


Rows = Iterator[tuple[Row, Position, int]]
"""Rows, each with the position behind it and the bytes on disk that are read by then."""
RowReader = Callable[[InputFile, Reading, Position], Rows]
"""This reads the rows of one file from a position on."""


def read_rows(
    files: Sequence[InputFile],
    reading: Reading,
    start: Position,
    readers: Mapping[str, RowReader] | None = None,
) -> Rows:
    """Every row from `start` on.

    Args:
        files: all of them.
        reading: what becomes of their contents.
        start: a position in them.
        readers: by format, for those that are not read by line; texts' columns of Parquet, else.

    Raises:
        UserError: a damaged file.
    """
    before = sum(file.size for file in files[: start.file])
    for index in range(start.file, len(files)):
        file = files[index]
        first = start if index == start.file else Position(index)
        rows = (readers or {"parquet": _parquet_rows}).get(file.format, _stream_rows)
        with damaged_gzip(file):
            for row, position, read_bytes in rows(file, reading, first):
                yield row, position, before + read_bytes
        before += file.size


@contextlib.contextmanager
def damaged_gzip(file: InputFile) -> Iterator[None]:
    """Turns what gzip raises while the file is read into a UserError that names it."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file.path}: damaged or incomplete gzip: {error}") from None


def opened(file: InputFile) -> IO[bytes]:
    """The file's bytes, unpacked."""
    require_regular(file.path)
    return gzip.open(file.path, "rb") if file.is_gzip else open_regular(file.path)  # pyright: ignore


def _stream_rows(file: InputFile, reading: Reading, start: Position) -> Rows:
    cut = _cut_lines
    if file.format == "text" and reading.split_text_on != "line":
        cut = _cut_file if reading.split_text_on == "file" else _cut_paragraphs
    with opened(file) as stream:
        # of a gzip it is the compressed file's place that says how far this is
        disk = stream.fileobj.raw if isinstance(stream, gzip.GzipFile) else stream  # pyright: ignore
        if start.offset:
            stream.seek(start.offset)
        for number, raw, offset, line in cut(stream, reading.max_row_bytes, start):
            if number <= 1 and raw is not None:
                raw = raw.removeprefix(BOM)
            position = Position(start.file, offset, line)
            yield Row(file.path, number, file.format, raw), position, disk.tell()


Document = tuple[int, bytes | None, int, int]
"""Line number, document, and the offset and number of lines behind it."""


def _cut_file(stream: IO[bytes], limit: int, start: Position) -> Iterator[Document]:
    if start.offset == 0 and start.line == 0:
        raw = stream.read(limit + 1)
        yield 0, raw if len(raw) <= limit else None, max(1, len(raw)), 1


def _cut_lines(stream: IO[bytes], limit: int, start: Position) -> Iterator[Document]:
    offset, line = start.offset, start.line
    for raw, length in _lines(stream, limit):
        offset, line = offset + length, line + 1
        if raw.strip():
            yield line, raw.rstrip(b"\r\n") if length <= limit else None, offset, line


def _cut_paragraphs(stream: IO[bytes], limit: int, start: Position) -> Iterator[Document]:
    """Documents are what stands between blank lines, without the last line's end."""
    offset, line, first, size = start.offset, start.line, 0, 0
    lines: list[bytes] = []

    def paragraph() -> Document:
        return first, b"".join(lines).rstrip(b"\r\n") if size <= limit else None, offset, line

    for raw, length in _lines(stream, limit):
        offset, line = offset + length, line + 1
        if raw.strip():
            first, size = first or line, size + length
            if size <= limit:
                lines.append(raw)
            continue
        if size:
            yield paragraph()
        lines, first, size = [], 0, 0
    if size:
        yield paragraph()


def _lines(stream: IO[bytes], limit: int) -> Iterator[tuple[bytes, int]]:
    """Lines with their lengths; of one longer than `limit` only the start is held."""
    while raw := stream.readline(limit + 1):
        length, end = len(raw), raw
        while not end.endswith(b"\n") and (end := stream.readline(limit + 1)):
            length += len(end)
        yield raw, length


def _parquet_rows(file: InputFile, reading: Reading, start: Position) -> Rows:
    import pyarrow as pa

    table = parquet_file(file.path)
    number, total = 0, max(1, table.metadata.num_rows)
    for group in range(table.num_row_groups):
        rows_in_group = table.metadata.row_group(group).num_rows
        if number + rows_in_group <= start.offset:
            number += rows_in_group
            continue
        batches = table.iter_batches(256, row_groups=[group], columns=list(reading.keys))
        for batch in batches:
            columns = [batch.column(batch.schema.names.index(key)) for key in reading.keys]
            columns = [
                c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in columns
            ]
            # as bytes, so that what is not UTF-8 spoils one row and not the batch
            lists = [column.cast(pa.large_binary()).to_pylist() for column in columns]
            for raw in zip(*lists, strict=True):
                number += 1
                if number <= start.offset:
                    continue
                row = Row(file.path, number, "parquet", raw)
                if row.num_bytes > reading.max_row_bytes:
                    row = row._replace(raw=None)
                position = Position(start.file, number, number)
                yield row, position, file.size * number // total
