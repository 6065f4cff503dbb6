"""Turns documents into Megatron's .bin/.idx: workers tokenize, one process writes, in order.

`inputs.py` gives the rows, `tokenization.py` their ids, `parts.py` keeps them so that a killed run
can go on, and `output.py` renames the whole into place.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import xxhash

from qwen2_ascend.data.inputs import (
    InputFile,
    Position,
    Reading,
    Row,
    check_inputs,
    find_inputs,
    read_rows,
)
from qwen2_ascend.data.output import Output
from qwen2_ascend.data.parts import Batch, Counts, Parts, State, join
from qwen2_ascend.data.progress import Progress, print_summary
from qwen2_ascend.data.settings import PreprocessSettings
from qwen2_ascend.data.tokenization import (
    ENDOFTEXT,
    BadRow,
    Encoded,
    Encoder,
    EncodeRows,
    TokenizerSpec,
    encode_in_worker,
    load_tokenizer,
    start_worker,
    without_ctrl_c,
)
from qwen2_ascend.errors import UserError
from qwen2_ascend.machine import num_cores

BATCH_BYTES, BATCH_ROWS = 256 * 1024, 1024
BATCHES_PER_WORKER = 3
SHOWN_BAD_ROWS = 20


def preprocess_texts(settings: PreprocessSettings) -> None:
    """Does what `settings` say and prints a summary.

    Raises:
        UserError: input, tokenizer or output cannot be used, or a bad row was met.
        OSError: the output cannot be written; finished parts are kept.
    """
    started = time.monotonic()
    reading = Reading(settings.json_keys, settings.split_text_on, settings.max_document_bytes)
    files = find_inputs(settings.input, settings.input_format)
    check_inputs(files, reading)
    tokenizer = load_tokenizer(settings.tokenizer_name_or_path, settings.eod_token)
    for note in _tokenizer_notes(settings, tokenizer):
        print(f"note: {note}", flush=True)
    state = State(
        settings=_deciding_settings(settings, files, tokenizer),
        counts={key: Counts() for key in settings.json_keys},
    )
    output = Output(settings, settings.json_keys)
    if output.is_complete(state.settings):
        print(f"{output.prefix}: complete already; nothing to do.")
        return
    with output.work_folder(state) as (folder, state):
        resumed_tokens = sum(counts.tokens for counts in state.counts.values())
        if not state.is_joined:
            make_encoder = partial(
                Encoder,
                tokenizer,
                keys=settings.json_keys,
                dtype=state.settings["dtype"],
                append_eod=settings.append_eod,
                max_row_bytes=settings.max_document_bytes,
            )
            rows = read_rows(files, reading, state.position)
            workers = settings.workers or num_cores()
            write_parts(settings, files, rows, make_encoder, folder, state, workers=workers)
            names = {key: output.dataset(key).name for key in settings.json_keys}
            join(folder, state, names, output.bad_rows.name)
        output.publish(folder, state)
    print_summary(output, state, time.monotonic() - started, resumed_tokens)


def _tokenizer_notes(settings: PreprocessSettings, tokenizer: TokenizerSpec) -> Iterator[str]:
    if not settings.append_eod:
        yield "documents run into one another: no --append-eod."
    elif tokenizer.eod is None:
        raise UserError(
            f"--append-eod: the tokenizer of {tokenizer.path} has no eos_token; name the token "
            "with --eod-token."
        )
    else:
        yield f"documents end with {tokenizer.eod_token} ({tokenizer.eod})."
        if settings.eod_token is None and tokenizer.eod_token == "<|im_end|>":
            yield f"Qwen's own pretraining ends documents with {ENDOFTEXT} (--eod-token)."


def _deciding_settings(
    settings: PreprocessSettings, files: Sequence[InputFile], tokenizer: TokenizerSpec
) -> dict[str, Any]:
    from qwen2_ascend.data.indexed import DType

    backend = tokenizer.backend or tokenizer.path
    return {
        "input": [[os.path.abspath(f.path), f.format, f.size, f.mtime_ns] for f in files],
        "json_keys": list(settings.json_keys),
        "split_text_on": settings.split_text_on,
        "max_document_bytes": settings.max_document_bytes,
        "tokenizer": xxhash.xxh3_64(backend.encode()).hexdigest(),
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod if settings.append_eod else None,
        "dtype": DType.optimal_dtype(tokenizer.largest_token + 1).__name__,
    }


# --- tokenizing -----------------------------------------------------------------------------------


def write_parts(
    settings: PreprocessSettings,
    files: Sequence[InputFile],
    rows: Iterable[tuple[Row, Position, int]],
    make_encoder: Callable[[], EncodeRows],
    folder: Path,
    state: State,
    *,
    workers: int,
) -> None:
    """Writes what encoders make of `rows` as parts, keeping `state` and its file up to date.

    Args:
        settings: where parts end, what becomes of bad rows, how often progress is reported.
        files: what is read, for the progress.
        rows: with the position behind each and the bytes read until there.
        make_encoder: called once in each worker; it is sent there, so it must pickle.
        folder: where the parts go.
        state: what is done already.
        workers: processes; with 1 this one does it all.
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
