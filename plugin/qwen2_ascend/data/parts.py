"""Parts: what a preprocessing run has finished so far, on disk, and how it becomes the result.

Every so many bytes of text the tokens written since the last time become a part, flushed to disk
and entered in `state.json` with the position behind it. A run that was killed goes on from there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qwen2_ascend.data.indexed import IndexedDatasetBuilder
from qwen2_ascend.data.inputs import Position, Row
from qwen2_ascend.data.state import Counts, State, part_name
from qwen2_ascend.data.tokenization import BadRow, Encoded
from qwen2_ascend.errors import UserError
from qwen2_ascend.files import read_bytes, write_file


class Batch(NamedTuple):
    """Rows that a worker takes at once."""

    rows: list[Row]
    end: Position
    """The position behind the last of them."""
    read_bytes: int
    """Bytes on disk that were read until here."""

    @property
    def num_bytes(self) -> int:
        return sum(row.num_bytes for row in self.rows)


class Parts:
    """Writes documents into parts; a context manager, so that files are closed on the way out."""

    def __init__(self, folder: Path, state: State, part_bytes: int) -> None:
        """Goes on after the parts that `state` knows, with a new one every `part_bytes` of text."""
        self._folder, self._state, self._part_bytes = folder, state, part_bytes
        self._begin()

    def _begin(self) -> None:
        state = self._state
        dtype = getattr(np, state.settings["dtype"])
        self._stem = self._folder / part_name(state.num_parts)
        self._builders = {
            key: IndexedDatasetBuilder(f"{self._stem}_{i}.bin", dtype=dtype)
            for i, key in enumerate(state.counts)
        }
        self._counts = {key: Counts(**asdict(counts)) for key, counts in state.counts.items()}
        self._bad_rows: list[BadRow] = []
        self._tallies = Counter(state.tallies)
        self._position = state.position
        self._text_bytes = 0

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *_: object) -> None:
        for builder in self._builders.values():
            builder.data_file.close()

    def add(self, batch: Batch, encoded: Encoded) -> None:
        """Writes a batch's documents, and finishes the part when it is large enough."""
        for key, builder in self._builders.items():
            tokens, lengths = encoded.tokens[key], encoded.lengths[key]
            ends = np.cumsum(lengths)
            for end, length in zip(ends.tolist(), lengths.tolist(), strict=True):
                document: Any = tokens[end - length : end]
                builder.add_document(document, [length])
            self._counts[key].add(lengths, tokens)
        self._bad_rows += encoded.bad_rows
        self._tallies.update(encoded.tallies or {})
        self._position = batch.end
        self._text_bytes += batch.num_bytes
        if self._text_bytes >= self._part_bytes:
            self._finish_part()
            self._begin()

    def finish(self) -> None:
        """Finishes the last part.

        Raises:
            UserError: no part holds any document.
        """
        if not any(counts.documents for counts in self._counts.values()):
            raise UserError("the input holds no document.")
        self._finish_part()

    def _finish_part(self) -> None:
        for i, builder in enumerate(self._builders.values()):
            builder.finalize(f"{self._stem}_{i}.idx")
            for suffix in (".bin", ".idx"):
                _fsync(f"{self._stem}_{i}{suffix}")
        if self._bad_rows:
            lines = "".join(f"{row.where}\t{row.reason}\n" for row in self._bad_rows)
            write_file(Path(f"{self._stem}_bad_rows.tsv"), lines.encode())
        state = self._state
        state.num_parts += 1
        state.position = self._position
        state.counts = self._counts
        state.bad_rows += len(self._bad_rows)
        state.tallies = dict(self._tallies)
        state.save(self._folder)


def join(folder: Path, state: State, names: Mapping[str, str], bad_rows_name: str) -> None:
    """Joins the parts of each key into `folder`/`names[key]`.bin and .idx, with megatron-core.

    Raises:
        OSError: not enough space.
    """
    parts = [folder / part_name(n) for n in range(state.num_parts)]
    if len(parts) > 1:
        _check_space(folder, parts, len(names))
    for i, key in enumerate(state.counts):
        joined = folder / names[key]
        if len(parts) == 1:
            for suffix in (".bin", ".idx"):
                _link(f"{parts[0]}_{i}{suffix}", f"{joined}{suffix}")
            continue
        builder = IndexedDatasetBuilder(f"{joined}.bin", dtype=getattr(np, state.settings["dtype"]))
        with contextlib.closing(builder.data_file):
            for part in parts:
                builder.add_index(f"{part}_{i}")
            builder.finalize(f"{joined}.idx")
        _fsync(f"{joined}.bin")
        _fsync(f"{joined}.idx")
    if state.bad_rows:
        lists = [Path(f"{part}_bad_rows.tsv") for part in parts]
        whole = b"".join(read_bytes(path) for path in lists if path.exists())
        write_file(folder / bad_rows_name, whole)
    state.is_joined = True
    state.save(folder)


def _fsync(path: str | Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _link(source: str, target: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(target)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
        _fsync(target)


def _check_space(folder: Path, parts: Sequence[Path], num_keys: int) -> None:
    needed = sum(
        os.path.getsize(f"{part}_{i}{suffix}")
        for part in parts
        for i in range(num_keys)
        for suffix in (".bin", ".idx")
    )
    if (free := shutil.disk_usage(folder).free) < needed:
        raise OSError(
            errno.ENOSPC,
            f"joining the parts takes {needed / 2**20:,.0f} MB and {free / 2**20:,.0f} MB are free",
            str(folder),
        )
