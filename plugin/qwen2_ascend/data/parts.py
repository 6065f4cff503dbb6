"""Parts: what a preprocessing run has finished so far, on disk, and how it becomes the result.

Every so many bytes of text the tokens written since the last time become a part, flushed to disk
and entered in `state.json` with the position behind it. A run that was killed goes on from there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qwen2_ascend.data.inputs import Position, Row
from qwen2_ascend.data.tokenization import BadRow, Encoded
from qwen2_ascend.errors import UserError
from qwen2_ascend.files import fsync_folder, read_bytes, write_file

STATE = "state.json"


@dataclass(kw_only=True)
class Counts:
    """What went into one key's output."""

    documents: int = 0
    tokens: int = 0
    shortest: int = 0
    longest: int = 0
    largest_token: int = 0
    """The largest id; a model with fewer rows in its embedding cannot take the data."""

    def add(self, lengths: np.ndarray, tokens: np.ndarray) -> None:
        """Counts documents of these lengths, in tokens, and their tokens."""
        if not lengths.size:
            return
        shortest, longest = int(lengths.min()), int(lengths.max())
        self.shortest = min(self.shortest, shortest) if self.documents else shortest
        self.longest = max(self.longest, longest)
        self.documents += lengths.size
        self.tokens += int(lengths.sum())
        self.largest_token = max(self.largest_token, int(tokens.max(initial=0)))


@dataclass(kw_only=True)
class State:
    """What an unfinished run has done; the contents of `state.json`."""

    settings: dict[str, Any]
    """All that decides about the result; a run is only resumed with the same."""
    num_parts: int = 0
    position: Position = field(default_factory=Position)
    counts: dict[str, Counts] = field(default_factory=dict)
    bad_rows: int = 0
    tallies: dict[str, int] = field(default_factory=dict)
    """Whatever else the encoder counts."""
    is_joined: bool = False
    """True when the whole result lies in the folder and only waits to be renamed."""

    def save(self, folder: Path) -> None:
        """Writes it whole; with it everything that was flushed before counts."""
        write_file(folder / STATE, json.dumps(asdict(self), indent=1).encode())
        fsync_folder(folder)

    @classmethod
    def load(cls, folder: Path) -> State | None:
        """The state in `folder`, None when there is none.

        Raises:
            UserError: it is not one of this version's.
        """
        path = folder / STATE
        if not path.exists():
            return None
        try:
            raw = json.loads(read_bytes(path))
            raw["counts"] = {key: Counts(**counts) for key, counts in raw["counts"].items()}
            raw["position"] = Position(*raw["position"])
            return cls(**raw)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} cannot be read ({error}); start again with --overwrite."
            ) from None


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
        from qwen2_ascend.data.indexed import IndexedDatasetBuilder

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


def part_name(number: int) -> str:
    """What all files of a part start with."""
    return f"part_{number:06d}"


def remove_unfinished(folder: Path, state: State) -> None:
    """Removes what no state knows of: the part in work when a run was killed, or everything."""
    known = tuple(part_name(n) for n in range(state.num_parts))
    for entry in os.scandir(folder):
        keep = entry.name.startswith(known) or not entry.name.startswith("part_")
        if not (keep and state.num_parts):
            os.unlink(entry.path)


def join(folder: Path, state: State, names: Mapping[str, str], bad_rows_name: str) -> None:
    """Joins the parts of each key into `folder`/`names[key]`.bin and .idx, with megatron-core.

    Raises:
        OSError: not enough space.
    """
    from qwen2_ascend.data.indexed import IndexedDatasetBuilder

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
