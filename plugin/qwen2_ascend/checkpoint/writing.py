"""Writes a planned checkpoint into a folder: tensors in parallel, a journal for resuming, fsync."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np

from qwen2_ascend.checkpoint.copying import (
    BandBuffers,
    Reader,
    SourceChecks,
    stored_checksum,
    write_bands,
)
from qwen2_ascend.checkpoint.formats.stored import FileLayout
from qwen2_ascend.checkpoint.plan import Plan, StoredSlice, Write
from qwen2_ascend.checkpoint.staging import empty_folder
from qwen2_ascend.checkpoint.target import Target
from qwen2_ascend.errors import UserError
from qwen2_ascend.files import naming, read_bytes

Checksums = dict[tuple[str, str], str]
"""xxh3-128 by (file, tensor name)."""

JOURNAL_FILE = ".journal.jsonl"
_WRITEBACK_BYTES = 8 << 20
_SYNC_FILE_RANGE_WRITE = 2


class Cancelled(Exception):
    """Another worker failed, or the user pressed Ctrl-C."""


class Journal:
    """Which tensors are complete, one line each, so that a killed run can be finished.

    The first line identifies the work; a run with other sources or settings cannot go on from it.
    Nothing here is flushed to disk: after a loss of power lines may be missing, garbled, or claim
    bytes that never arrived, so `write_target` reads back what the journal claims.

    Attributes:
        done: the checksum of every tensor that is complete.
    """

    def __init__(self, folder: Path, identity: Mapping[str, object], *, resume: bool) -> None:
        """Opens the journal in `folder`; a folder without a usable one is emptied first.

        Raises:
            UserError: with `resume`, when the folder belongs to other work.
        """
        path = folder / JOURNAL_FILE
        head = json.dumps(identity, sort_keys=True).encode()
        lines = read_bytes(path).split(b"\n") if resume and path.exists() else []
        complete = lines[:-1]  # a line without its end was being written
        self.done: Checksums = {}
        self._lock = threading.Lock()
        if complete and complete[0].startswith(b"{") and complete[0] != head:
            raise UserError(
                f"{folder}: belongs to a conversion with another source or other options; repeat "
                "those, or start again with --overwrite."
            )
        if complete and complete[0] == head:
            self.done = dict(_entries(complete[1:]))
            os.truncate(path, sum(len(line) + 1 for line in complete))
        else:
            empty_folder(folder)
            with naming(path):
                path.write_bytes(head + b"\n")
        self._path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115

    def record(self, file: str, name: str, checksum: str, *, is_kept: bool = True) -> None:
        """Takes a complete tensor; a run that resumes sees it where it is kept."""
        with self._lock, naming(self._path):
            self.done[file, name] = checksum
            if is_kept:
                self._file.write(json.dumps([file, name, checksum]).encode() + b"\n")

    def close(self) -> None:
        self._file.close()


def write_target(
    folder: Path,
    target: Target,
    plan: Plan,
    journal: Journal,
    *,
    workers: int,
    progress: Callable[[int], object],
    open_reader: Callable[[], Reader],
    checks: SourceChecks,
) -> Checksums:
    """Writes every file of `target` below `folder` and flushes it to disk.

    Args:
        folder: where the target's relative paths begin.
        target: the files.
        plan: what fills them.
        journal: what an earlier, killed run already wrote; each is read back before it is
            believed.
        workers: threads.
        progress: called with the bytes of each tensor that is done.
        open_reader: makes what the sources are read with.
        checks: what the sources' bytes are checked with while they are read.

    Returns:
        The checksum of every tensor.

    Raises:
        OSError: the disk is full or failing.
        UserError: numbers are too large for the target's dtype.
    """
    before = dict(journal.done)
    files = _Files(folder, target.files, plan.writes, keep_contents=bool(before))
    buffers = BandBuffers()

    def one(write: Write) -> None:
        held, key = write.target, _key(write)
        stored = held.stored._replace(path=folder / held.stored.path)
        if key not in before or stored_checksum(stored) != before[key]:
            checks.before(write, reader)
            checksum = write_bands(write, reader, buffers, files.putter(held))
            # what casts lost is not in the journal: a run that resumes counts it again
            loses = any(copy.source in reader.losses for copy in write.copies)
            journal.record(*key, checksum, is_kept=not loses)
        files.finish(held)
        progress(held.stored.num_bytes)

    with open_reader() as reader, contextlib.closing(files), ThreadPoolExecutor(workers) as pool:
        try:
            _run_all(pool, one, sorted(plan.writes, key=_place))
        except BaseException:
            files.cancelled.set()
            raise
    return {key: journal.done[key] for key in map(_key, plan.writes)}


class _Files:
    """The open target files; each is flushed and closed when its last tensor is done.

    Attributes:
        cancelled: once it is set, nothing is written any more.
    """

    def __init__(
        self,
        folder: Path,
        files: Mapping[Path, FileLayout],
        writes: Iterable[Write],
        *,
        keep_contents: bool,
    ) -> None:
        self._folder = folder
        self._files = files
        self._left: dict[Path, int] = defaultdict(int)
        for write in writes:
            self._left[write.target.stored.path] += 1
        self.cancelled = threading.Event()
        self._keep = keep_contents
        self._fds: dict[Path, int] = {}
        self._lock = threading.Lock()
        for path in set(files) - set(self._left):
            self._flush(path, self._open(path))

    def _open(self, path: Path) -> int:
        full = self._folder / path
        full.parent.mkdir(parents=True, exist_ok=True)
        keep = 0 if self._keep else os.O_TRUNC
        fd = os.open(full, os.O_RDWR | os.O_CREAT | keep, 0o666)
        try:
            with naming(path):
                reserve(fd, self._files[path].total_bytes)
                for offset, data in self._files[path].segments:
                    pwrite(fd, memoryview(data), offset)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def putter(self, held: StoredSlice) -> Callable[[int, np.ndarray], None]:
        """A function that writes bands of one tensor and starts their way to the disk early."""
        path, start = held.stored.path, held.stored.offset
        fd = self._fd(path)
        pending = 0

        def put(position: int, band: np.ndarray) -> None:
            nonlocal pending
            if self.cancelled.is_set():
                raise Cancelled
            data = memoryview(band.reshape(-1).view(np.uint8).data)
            with naming(path):
                pwrite(fd, data, start + position)
            pending += len(data)
            if pending >= _WRITEBACK_BYTES:
                start_writeback(fd, start + position + len(data) - pending, pending)
                pending = 0

        return put

    def _fd(self, path: Path) -> int:
        with self._lock:
            if path not in self._fds:
                self._fds[path] = self._open(path)
            return self._fds[path]

    def finish(self, held: StoredSlice) -> None:
        """Counts a tensor as written; the last one of a file flushes it."""
        path = held.stored.path
        with self._lock:
            fd = self._fds.get(path)
        if fd is not None:
            # still open: only the file's last tensor closes it, and this one does not count yet
            start_writeback(fd, held.stored.offset, held.stored.num_bytes)
        with self._lock:
            self._left[path] -= 1
            if self._left[path]:
                return
            fd = self._fds.pop(path, None)
        self._flush(path, self._open(path) if fd is None else fd)

    @staticmethod
    def _flush(path: Path, fd: int) -> None:
        try:
            with naming(path):
                os.fsync(fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


def _run_all(
    pool: ThreadPoolExecutor, one: Callable[[Write], None], writes: Iterable[Write]
) -> None:
    futures = [pool.submit(one, write) for write in writes]
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        for future in futures:
            future.cancel()
    failures = [f.exception() for f in futures if not f.cancelled() and f.done()]
    for failure in failures:
        if failure is not None and not isinstance(failure, Cancelled):
            raise failure


def pwrite(fd: int, data: memoryview, offset: int) -> None:
    """Writes all of `data` at `offset`."""
    while len(data):
        n = os.pwrite(fd, data, offset)
        data, offset = data[n:], offset + n


def reserve(fd: int, num_bytes: int) -> None:
    """Sets a file's length and takes the space for it: writes cost less and a full disk shows now.

    Where the file system cannot, space is taken as it is written. (os.posix_fallocate would write
    zeros instead.)
    """
    os.ftruncate(fd, num_bytes)
    if _fallocate is None or num_bytes == 0:
        return
    if _fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(num_bytes)) != 0:
        code = ctypes.get_errno()
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(code, os.strerror(code))


def start_writeback(fd: int, offset: int, num_bytes: int) -> None:
    """Asks the kernel to begin writing a range out, so that the final fsync finds little to do."""
    if _sync_file_range is not None:
        _sync_file_range(
            fd, ctypes.c_int64(offset), ctypes.c_int64(num_bytes), _SYNC_FILE_RANGE_WRITE
        )


_libc = ctypes.CDLL(None, use_errno=True)
_sync_file_range = getattr(_libc, "sync_file_range", None)
_fallocate = getattr(_libc, "fallocate64", None) or getattr(_libc, "fallocate", None)


def _entries(lines: Iterable[bytes]) -> Iterable[tuple[tuple[str, str], str]]:
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):
            file, name, checksum = json.loads(line)
            yield (str(file), str(name)), str(checksum)


def _key(write: Write) -> tuple[str, str]:
    return str(write.target.stored.path), write.target.name


def _place(write: Write) -> tuple[str, int]:
    return str(write.target.stored.path), write.target.stored.offset
