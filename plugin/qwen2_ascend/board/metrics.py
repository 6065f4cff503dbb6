"""A metrics.jsonl that may grow, be rewritten or be broken, read in bounded memory.

`MetricsFile.update` reads on from where it stopped. Rows are gathered into at most CAPACITY buckets
that keep the mean, the smallest and the largest value of each series; when they are full, each two
become one. So a spike stays visible however long the run is, and a file takes the same memory with
a thousand rows as with a million. `sample` looks at rows spread over a file without reading the
rest: it is what a page shows of a large file at once, until `update` has read all of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qwen2_ascend.board.forms import finite
from qwen2_ascend.errors import UserError
from qwen2_ascend.files import open_regular

CAPACITY = 1024
"""Buckets of a file."""
BLOCK_BYTES = 1 << 20
"""What is read at once."""
MAX_LINE_BYTES = 1 << 16
"""Longer lines are no rows of a log."""
MAX_SERIES = 48
"""Names in a file beyond these are left out."""
MAX_NAME = 80
"""Characters of a series' name."""
TAIL_BYTES = 1 << 15
"""How much of the end of a file is read to find its last rows."""
LARGEST = 1e100
"""A figure beyond it is none: sums of it and squares would be infinite, which JSON cannot say."""
SAMPLE_BYTES = 2048
"""What is read at each place of a sample; a row has about 300."""
_MARK = 64
"""Bytes before the place of reading that must still be there when it goes on."""

_NUMBERS = {int, float, type(None)}
Row = dict[str, Any]


class Point(NamedTuple):
    """One bucket of one series."""

    iteration: int
    mean: float
    low: float
    high: float


class Buckets:
    """Rows in order, gathered into at most CAPACITY buckets of equally many rows each."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._stride = 1
        self._last = np.zeros(CAPACITY, np.int64)
        """The iteration of a bucket's last row."""
        self._series: dict[str, np.ndarray] = {}
        """`[CAPACITY, 4]` each: sum, number, smallest, largest."""

    @property
    def names(self) -> list[str]:
        """The names of the series that have a value."""
        return list(self._series)

    def add(self, rows: Sequence[Row]) -> None:
        """Takes rows; where the iteration goes back, what was after it is forgotten."""
        iterations = np.array([row["iteration"] for row in rows], np.int64)
        begin = 0
        previous = self._last[self._used - 1] if self._used else -1
        for at in np.flatnonzero(np.diff(iterations, prepend=previous) < 0).tolist():
            self._append(rows[begin:at], iterations[begin:at])
            self._forget_from(int(iterations[at]))
            begin = at
        self._append(rows[begin:], iterations[begin:])

    def points(self, name: str, most: int = CAPACITY) -> list[Point]:
        """A series' buckets, joined until there are at most `most`."""
        if name not in self._series or not self._used:
            return []
        table, last = self._series[name][: self._used], self._last[: self._used]
        group = -(-self._used // max(most, 1))
        starts = np.arange(0, self._used, group)
        sums = np.add.reduceat(table[:, :2], starts)
        lows = np.minimum.reduceat(table[:, 2], starts)
        highs = np.maximum.reduceat(table[:, 3], starts)
        ends = last[np.minimum(starts + group, self._used) - 1]
        kept = np.flatnonzero(sums[:, 1] > 0)
        means = sums[kept, 0] / sums[kept, 1]
        columns = (ends[kept], means, lows[kept], highs[kept])
        return [Point(*values) for values in zip(*(c.tolist() for c in columns), strict=True)]

    @property
    def _used(self) -> int:
        return -(-self.num_rows // self._stride)

    def _append(self, rows: Sequence[Row], iterations: np.ndarray) -> None:
        if not len(rows):
            return
        while (self.num_rows + len(rows) - 1) // self._stride >= CAPACITY:
            self._halve()
        numbers = (self.num_rows + np.arange(len(rows))) // self._stride
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))
        places = numbers[starts]
        ends = np.append(starts[1:], len(rows)) - 1
        self._last[places] = iterations[ends]
        for name in dict.fromkeys(name for row in rows for name in row):
            if name == "iteration" or not self._is_kept(name):
                continue
            values = _numbers(rows, name)
            if values is not None:
                self._add_series(name, values, starts, places)
        self.num_rows += len(rows)

    def _is_kept(self, name: str) -> bool:
        return name in self._series or (len(self._series) < MAX_SERIES and len(name) <= MAX_NAME)

    def _add_series(
        self, name: str, values: np.ndarray, starts: np.ndarray, places: np.ndarray
    ) -> None:
        if name not in self._series:
            self._series[name] = np.tile([0.0, 0.0, np.inf, -np.inf], (CAPACITY, 1))
        table, known = self._series[name], np.isfinite(values)
        table[places, 0] += np.add.reduceat(np.where(known, values, 0.0), starts)
        table[places, 1] += np.add.reduceat(known.astype(float), starts)
        lows = np.minimum.reduceat(np.where(known, values, np.inf), starts)
        highs = np.maximum.reduceat(np.where(known, values, -np.inf), starts)
        table[places, 2] = np.minimum(table[places, 2], lows)
        table[places, 3] = np.maximum(table[places, 3], highs)

    def _halve(self) -> None:
        """Each two buckets become one."""
        half = CAPACITY // 2
        self._last[:half] = np.maximum(self._last[0::2], self._last[1::2])
        self._last[half:] = 0
        for table in self._series.values():
            first, second = table[0::2].copy(), table[1::2].copy()
            table[:half, :2] = first[:, :2] + second[:, :2]
            table[:half, 2] = np.minimum(first[:, 2], second[:, 2])
            table[:half, 3] = np.maximum(first[:, 3], second[:, 3])
            table[half:] = (0.0, 0.0, np.inf, -np.inf)
        self._stride *= 2

    def _forget_from(self, iteration: int) -> None:
        """Drops the buckets that hold this iteration or a later one."""
        kept = int(np.searchsorted(self._last[: self._used], iteration))
        self._last[kept:] = 0
        for table in self._series.values():
            table[kept:] = (0.0, 0.0, np.inf, -np.inf)
        self.num_rows = kept * self._stride


class MetricsFile:
    """What is known of one file.

    Args:
        path: it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._buckets = Buckets()
        self._sample: Buckets | None = None
        self.offset = 0
        """Bytes that have been read."""
        self.size = 0
        """Bytes that there were at the last look."""
        self.num_bad_lines = 0
        self.first_bad_line: str | None = None
        self.error: str | None = None
        """Why the file cannot be read at all."""
        self._identity: tuple[int, int] | None = None
        self._mark = b""
        self._rest = b""
        """The beginning of a line whose end has not been written yet."""
        self._skips_line = False
        """Whether what comes next belongs to a line that is too long."""

    @property
    def buckets(self) -> Buckets:
        """What is to be shown: the sample, until the file has been read."""
        return self._buckets if self._sample is None else self._sample

    @property
    def is_sampled(self) -> bool:
        """Whether only rows here and there have been looked at so far."""
        return self._sample is not None

    @property
    def is_complete(self) -> bool:
        """Whether all that was there at the last look has been read."""
        return self.offset >= self.size

    @property
    def revision(self) -> str:
        """Another text whenever there is something else to show."""
        place = "sample" if self.is_sampled else self.offset
        return "-".join(map(str, (*(self._identity or ()), place)))

    def update(self, most_bytes: int = 1 << 40) -> None:
        """Reads on, `most_bytes` at most; `error` says why a file cannot be read."""
        try:
            with open_regular(self.path) as file:
                self._read_on(file.fileno(), most_bytes)
        except (OSError, UserError) as error:
            self._fail(error)

    def sample(self, places: int) -> None:
        """Looks at rows at `places` places of the file; `update` then reads it from its start."""
        self._begin_anew()
        try:
            with open_regular(self.path) as file:
                status = os.fstat(file.fileno())
                self.size, self._identity = status.st_size, (status.st_dev, status.st_ino)
                rows = _sampled(file.fileno(), status.st_size, places)
        except (OSError, UserError) as error:
            self._fail(error)
            return
        self._sample = Buckets()
        if rows:
            self._sample.add(rows)

    def _fail(self, error: OSError | UserError) -> None:
        self._begin_anew()
        self.error = (
            str(error)
            if isinstance(error, UserError)
            else (f"{self.path.name}: cannot be read: {error.strerror or error}.")
        )

    def _read_on(self, fd: int, most_bytes: int) -> None:
        status = os.fstat(fd)
        if not self._is_same(fd, status):
            self._begin_anew()
        self.error = None
        self.size, self._identity = status.st_size, (status.st_dev, status.st_ino)
        end = min(status.st_size, self.offset + most_bytes)
        while self.offset < end:
            block = os.pread(fd, min(BLOCK_BYTES, end - self.offset), self.offset)
            if not block:
                break
            self.offset += len(block)
            self._take(block)
        begin = max(0, self.offset - _MARK)
        self._mark = os.pread(fd, self.offset - begin, begin)
        if self.is_complete:
            self._sample = None

    def _is_same(self, fd: int, status: os.stat_result) -> bool:
        """Whether the file is the one that was read, with what was read still in it."""
        if self._identity != (status.st_dev, status.st_ino) or status.st_size < self.offset:
            return False
        return os.pread(fd, len(self._mark), self.offset - len(self._mark)) == self._mark

    def _take(self, block: bytes) -> None:
        lines = (self._rest + block).split(b"\n")
        self._rest = lines.pop()
        if self._skips_line and lines:
            lines.pop(0)
            self._skips_line = False
        if len(self._rest) > MAX_LINE_BYTES:
            if not self._skips_line:
                self._complain(self._rest)
            self._rest, self._skips_line = b"", True
        rows, bad = parse_lines(lines)
        for line in bad:
            self._complain(line)
        if rows:
            self._buckets.add(rows)

    def _complain(self, line: bytes) -> None:
        self.num_bad_lines += 1
        if self.first_bad_line is None:
            self.first_bad_line = line[:80].decode("utf-8", "replace")


def parse_lines(lines: Sequence[bytes]) -> tuple[list[Row], list[bytes]]:
    """The rows of a log and the lines that are none."""
    lines = [line for line in lines if line.strip()]
    if not lines:
        return [], []
    if all(len(line) <= MAX_LINE_BYTES for line in lines):
        try:
            rows = json.loads(b"[" + b",".join(lines) + b"]")
            if len(rows) == len(lines) and all(map(_is_row, rows)):
                return rows, []
        except (ValueError, RecursionError):
            pass
    parsed = [_parsed(line) for line in lines]
    bad = [line for line, row in zip(lines, parsed, strict=True) if row is None]
    return [row for row in parsed if row is not None], bad


def _parsed(line: bytes) -> Row | None:
    if len(line) > MAX_LINE_BYTES:
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if _is_row(row) else None


def _is_row(row: Any) -> bool:
    """Whether it is what a log writes: an object of an iteration."""
    if not isinstance(row, dict):
        return False
    iteration = row.get("iteration")
    return type(iteration) is int and 0 <= iteration < 1 << 62


def last_rows(path: Path) -> tuple[Row | None, Row | None]:
    """(the last row of training, the last validation) in the end of a file.

    Raises:
        OSError, UserError: it cannot be read.
    """
    with open_regular(path) as file:
        begin = max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES)
        data = os.pread(file.fileno(), TAIL_BYTES, begin)
    lines = data.split(b"\n")
    rows = list(filter(None, map(_parsed, lines[1 if begin else 0 :])))
    training = next((row for row in reversed(rows) if "loss" in row), None)
    validation = next((row for row in reversed(rows) if "validation_loss" in row), None)
    return training, validation


def number(row: Mapping[str, Any] | None, name: str) -> float | None:
    """A finite number of a row, or None."""
    return None if row is None else finite(row.get(name), LARGEST)


def _sampled(fd: int, size: int, places: int) -> list[Row]:
    """The first whole rows behind each of some places of a file, in their order."""
    found: dict[tuple[int, bool], Row] = {}
    step = max(size // max(places, 1), 1)
    for offset in (*range(0, size, step), max(0, size - SAMPLE_BYTES)):
        lines = os.pread(fd, SAMPLE_BYTES, offset).split(b"\n")
        # the first line is cut, unless the file begins there; so is the last one
        for line in lines[1 if offset else 0 : -1][:2]:
            row = _parsed(line) if line.strip() else None
            if row is not None:
                found[row["iteration"], "loss" in row] = row
    return [found[key] for key in sorted(found)]


def _numbers(rows: Sequence[Row], name: str) -> np.ndarray | None:
    """A column of rows, NaN where there is no finite number; None where there is no number."""
    given = [row.get(name) for row in rows]
    try:
        if not _NUMBERS.issuperset(map(type, given)):
            raise TypeError  # numpy would read True and "1.5" as numbers
        values = np.array(given, dtype=np.float64)
    except (TypeError, OverflowError):
        values = np.array([finite(value, LARGEST) for value in given], dtype=np.float64)
    values[~(np.abs(values) < LARGEST)] = np.nan
    return None if np.isnan(values).all() else values
