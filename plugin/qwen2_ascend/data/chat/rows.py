"""The rows of files of chats, each as the bytes of one JSON object, from any position on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from qwen2_ascend.data.inputs import (
    BOM,
    InputFile,
    Position,
    Reading,
    Row,
    Rows,
    check_inputs,
    damaged_gzip,
    find_inputs,
    opened,
    parquet_file,
    read_rows,
)
from qwen2_ascend.errors import UserError, raise_if, shown
from qwen2_ascend.files import json_value

SUFFIXES = (".json", ".jsonl", ".ndjson", ".jl", ".parquet")


def is_chat_file(word: str) -> bool:
    """Whether a word of --data-path is a file of chats, not a prefix."""
    return word.lower().removesuffix(".gz").endswith(SUFFIXES)


def find_chat_files(
    words: Sequence[str], input_format: str, max_row_bytes: int
) -> tuple[list[InputFile], Reading]:
    """The files that `words` name, as jsonl, json (one array) or parquet.

    Raises:
        UserError: nothing there, or files of another kind.
    """
    files = find_inputs(words, input_format)
    reading = Reading((), "line", max_row_bytes)
    files = [
        file._replace(format="json") if file.format == "jsonl" and _is_array(file) else file
        for file in files
    ]
    raise_if(
        f"{file.path}: is no .json, .jsonl or .parquet file; say --input-format if it is one."
        for file in files
        if file.format == "text"
    )
    check_inputs([file for file in files if file.format == "jsonl"], reading)
    return files, reading


def where(row: Row) -> str:
    """A row as a user finds it: by line, or by number where rows are not lines."""
    return row.where if row.format == "jsonl" else f"{row.path} row {row.number}"


def read_chat_rows(files: Sequence[InputFile], reading: Reading, start: Position) -> Rows:
    """As `read_rows`; a JSON array is read whole.

    Raises:
        UserError: a damaged file.
    """
    readers = {
        "json": partial(_numbered, _array_rows),
        "parquet": partial(_numbered, _parquet_rows),
    }
    return read_rows(files, reading, start, readers)


def _numbered(
    read: Callable[[InputFile], tuple[int, Iterator[bytes]]],
    file: InputFile,
    reading: Reading,
    start: Position,
) -> Rows:
    total, raws = read(file)
    for number, raw in enumerate(raws, 1):
        if number <= start.offset:
            continue
        whole = raw if len(raw) <= reading.max_row_bytes else None
        row = Row(file.path, number, file.format, whole)
        yield row, Position(start.file, number, number), file.size * number // max(1, total)


def _is_array(file: InputFile) -> bool:
    with damaged_gzip(file), opened(file) as stream:
        return stream.read(4096).removeprefix(BOM).lstrip().startswith(b"[")


def _array_rows(file: InputFile) -> tuple[int, Iterator[bytes]]:
    try:
        with opened(file) as stream:
            values = json_value(stream.read().removeprefix(BOM))
    except UnicodeDecodeError as error:
        raise UserError(f"{file.path}: is not UTF-8 at byte {error.start + 1}.") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file.path}:{error.lineno}: is not JSON: {error.msg} at column {error.colno}."
        ) from None
    except ValueError as error:
        raise UserError(f"{file.path}: is not JSON: {error}.") from None
    return len(values), (_dumped(value) for value in values)


def _parquet_rows(file: InputFile) -> tuple[int, Iterator[bytes]]:
    import pyarrow as pa

    try:
        table = parquet_file(file.path)
    except pa.ArrowInvalid as error:
        text = " ".join(str(error).split())
        raise UserError(f"{file.path}: is not a Parquet file: {text}") from None
    batches = table.iter_batches(256)
    return table.metadata.num_rows, (row for batch in batches for row in _batch_rows(batch))


def _batch_rows(batch: Any) -> Iterator[bytes]:
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:  # a single row's fault
        for number in range(batch.num_rows):
            try:
                (row,) = batch.slice(number, 1).to_pylist()
                yield _dumped(_without_nulls(row))
            except UnicodeDecodeError as error:
                yield error.object[error.start : error.end]
        return
    yield from (_dumped(_without_nulls(row)) for row in rows)


def _dumped(value: Any) -> bytes:
    # escaped, so that half of a surrogate pair is the row's fault and not the file's
    return json.dumps(value, default=_as_json).encode()


def _as_json(value: Any) -> Any:
    """A value that Parquet has and JSON has not: bytes are a text, others an object that is none.

    Some writers give all their texts as bytes. A date or a decimal number would be trained on as
    whatever Python makes of it.
    """
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode("utf-8")
    return {f"Parquet's {type(value).__name__}": shown(value)}


def _without_nulls(value: Any) -> Any:
    """A Parquet row without the keys that only other rows have: its structs hold all rows' keys."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
