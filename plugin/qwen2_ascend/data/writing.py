"""Writes datasets: workers tokenize batches of rows, and this process writes them, in order."""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from pathlib import Path

from qwen2_ascend.data.inputs import InputFile, Position, Row
from qwen2_ascend.data.parts import Batch, Parts, join
from qwen2_ascend.data.progress import Progress
from qwen2_ascend.data.settings import PreprocessSettings
from qwen2_ascend.data.state import State
from qwen2_ascend.data.tokenization import (
    BadRow,
    Encoded,
    EncodeRows,
    encode_in_worker,
    start_worker,
    without_ctrl_c,
)
from qwen2_ascend.errors import UserError

BATCH_BYTES, BATCH_ROWS = 256 * 1024, 1024
BATCHES_PER_WORKER = 3
SHOWN_BAD_ROWS = 20


def write_datasets(
    settings: PreprocessSettings,
    files: Sequence[InputFile],
    rows: Iterable[tuple[Row, Position, int]],
    make_encoder: Callable[[], EncodeRows],
    folder: Path,
    state: State,
    *,
    names: Mapping[str, str],
    bad_rows_name: str,
    workers: int,
) -> None:
    """Writes what encoders make of `rows` as parts, and joins these.

    Args:
        settings: where parts end, what becomes of bad rows, how often progress is reported.
        files: what is read, for the progress.
        rows: with the position behind each and the bytes read until there.
        make_encoder: called once in each worker; it is sent there, so it must pickle.
        folder: where parts and datasets go.
        state: what is done already; it is kept up to date, and so is its file.
        names: the dataset of each key.
        bad_rows_name: the list of rows that were left out.
        workers: processes; with 1 this one does it all.

    Raises:
        UserError: a bad row was met, or there is no document.
        OSError: not enough space.
    """
    bad_rows = BadRows(settings.on_bad_row)
    progress = Progress(sum(file.size for file in files), settings.log_interval)
    part_bytes = int(settings.save_interval_mb * 2**20)
    batches = _batches(rows, min(part_bytes, BATCH_BYTES))
    with (
        Parts(folder, state, part_bytes) as parts,
        progress,
        _encode(workers, make_encoder) as encode,
    ):
        for batch, encoded in encode(batches):
            bad_rows.add(encoded.bad_rows)
            parts.add(batch, encoded)
            progress.update(
                documents=len(batch.rows) - len(encoded.bad_rows),
                tokens=encoded.num_tokens,
                read_bytes=batch.read_bytes,
            )
        parts.finish()
    bad_rows.say_how_many_more()
    join(folder, state, names, bad_rows_name)


def _batches(rows: Iterable[tuple[Row, Position, int]], num_bytes: int) -> Iterator[Batch]:
    waiting: list[Row] = []
    size, end, read_bytes = 0, Position(), 0
    for row, end, read_bytes in rows:
        waiting.append(row)
        size += row.num_bytes
        if size >= num_bytes or len(waiting) >= BATCH_ROWS:
            yield Batch(waiting, end, read_bytes)
            waiting, size = [], 0
    if waiting:
        yield Batch(waiting, end, read_bytes)


Encode = Callable[[Iterable[Batch]], Iterator[tuple[Batch, Encoded]]]


@contextlib.contextmanager
def _encode(workers: int, make_encoder: Callable[[], EncodeRows]) -> Iterator[Encode]:
    """A function that tokenizes batches, in order, in `workers` processes (1: in this one)."""
    if workers == 1:
        encoder = make_encoder()
        yield lambda batches: ((batch, encoder(batch.rows)) for batch in batches)
        return
    others = set(active_children())
    pool = ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),
        initializer=start_worker,
        initargs=(make_encoder,),
    )
    try:
        yield lambda batches: _in_order(pool, batches, workers * BATCHES_PER_WORKER)
    except BrokenProcessPool:
        # The pool does not end a worker that was just being started, and then waits for it forever.
        for worker in set(active_children()) - others:
            worker.kill()
        raise RuntimeError(
            "a worker process was killed, most likely for want of memory; take fewer --workers or "
            "a smaller --max-document-bytes, and go on with --resume."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, batches: Iterable[Batch], ahead: int
) -> Iterator[tuple[Batch, Encoded]]:
    """Results in the order of `batches`, at most `ahead` of them under way."""
    waiting: deque[tuple[Batch, Future[Encoded]]] = deque()
    for batch in batches:
        try:
            with without_ctrl_c():  # this may start a worker, and it inherits
                waiting.append((batch, pool.submit(encode_in_worker, batch.rows)))
        except OSError as error:  # it breaks just while it starts another worker
            raise BrokenProcessPool from error
        if len(waiting) >= ahead:
            first, future = waiting.popleft()
            yield first, future.result()
    while waiting:
        first, future = waiting.popleft()
        yield first, future.result()


class BadRows:
    """Stops at bad rows or says which they are, the first of them one by one."""

    def __init__(self, on_bad_row: str) -> None:
        self._stop = on_bad_row == "stop"
        self._count = 0

    def add(self, bad_rows: Sequence[BadRow]) -> None:
        """Raises UserError if a bad row is the end, else prints it."""
        if bad_rows and self._stop:
            faults = [f"{row.where}: {row.reason}." for row in bad_rows[:SHOWN_BAD_ROWS]]
            faults.append("--on-bad-row skip leaves such rows out.")
            raise UserError(faults)
        for row in bad_rows[: max(0, SHOWN_BAD_ROWS - self._count)]:
            print(f"skipped {row.where}: {row.reason}", file=sys.stderr)
        self._count += len(bad_rows)

    def say_how_many_more(self) -> None:
        """The rows that `add` did not print."""
        if self._count > SHOWN_BAD_ROWS:
            print(f"skipped {self._count - SHOWN_BAD_ROWS} more rows", file=sys.stderr)
