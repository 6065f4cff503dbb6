"""Executes plans: reads boxes of stored tensors and puts them where they belong.

A target is filled band by band (about a megabyte, so that it stays in the processor's cache while
it is read, hashed and written). A band that is one run of bytes in its source is read straight
into the buffer; columns are gathered from a memory map. No tensor is ever held whole.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path

import numpy as np
import xxhash

from qwen2_ascend.checkpoint.casting import CastLosses, assign
from qwen2_ascend.checkpoint.formats.stored import NUMPY_DTYPES, StoredTensor
from qwen2_ascend.checkpoint.plan import Copy, StoredSlice, Write, bands, extent, overlap, volume
from qwen2_ascend.checkpoint.rules import Box, TensorSlice
from qwen2_ascend.errors import DamagedError, VerificationError
from qwen2_ascend.files import open_descriptor

BAND_BYTES = 1 << 20


class Reader:
    """Reads stored tensors; keeps files open and mapped until closed. Threads may share one.

    Leaving its block raises UserError where casts lost what `losses` does not allow, so that no
    reader can forget to look.

    Attributes:
        losses: what the casts lost.
    """

    def __init__(self, losses: CastLosses | None = None) -> None:
        self.losses = losses or CastLosses()
        self._files: dict[Path, tuple[int, mmap.mmap]] = {}
        self._lock = threading.Lock()
        allow_many_open_files()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        for fd, mapped in self._files.values():
            # an exception on its way out may hold arrays over the map: it goes with them then
            with contextlib.suppress(BufferError):
                mapped.close()
            os.close(fd)
        self._files.clear()
        if kind is None:
            self.losses.check()

    def _open(self, path: Path) -> tuple[int, mmap.mmap]:
        with self._lock:
            if path not in self._files:
                fd = open_descriptor(path)
                self._files[path] = (fd, mmap.mmap(fd, 0, prot=mmap.PROT_READ))
            return self._files[path]

    def view(self, held: StoredSlice, box: Box) -> np.ndarray:
        """`box` (of the tensor's view) as a `[blocks, rows, columns]` array over the file.

        Raises:
            VerificationError: the file has become shorter; touching its lost pages would kill the
                process.
        """
        fd, mapped = self._open(held.stored.path)
        if os.fstat(fd).st_size < held.stored.offset + held.stored.num_bytes:
            raise _ended(held)
        whole, dtype = held.piece.box, NUMPY_DTYPES[held.stored.dtype]
        flat = np.frombuffer(mapped, dtype, volume(whole), held.stored.offset)
        return flat.reshape(extent(whole))[within(box, whole)]

    def read_run(self, held: StoredSlice, box: Box, out: np.ndarray) -> None:
        """Reads a box that is one run of the file's bytes into `out` (contiguous, same dtype).

        Raises:
            OSError: the file cannot be read.
            VerificationError: it ends too soon.
        """
        fd, _ = self._open(held.stored.path)
        start = _run_start(held, box)
        raw = memoryview(out.reshape(-1).view(np.uint8).data)
        while len(raw):
            try:
                n = os.preadv(fd, [raw], start)
            except OSError as error:
                raise OSError(
                    f"{held.stored.path}: cannot be read ({held.name}): {error.strerror}."
                ) from None
            if n == 0:
                raise _ended(held)
            raw, start = raw[n:], start + n

    def checksum(self, held: StoredSlice) -> str:
        """The xxh3-128 checksum of a stored tensor's bytes, in hexadecimal."""
        return _read_checksum(self._open(held.stored.path)[0], held.stored)

    def fill(self, out: np.ndarray, box: Box, copies: Sequence[Copy]) -> None:
        """Fills `out`, a `[blocks, rows, columns]` array of `box`, from the sources.

        Casts to `out`'s dtype and counts what that loses; leaves what no copy covers untouched.
        """
        for copy in copies:
            common = overlap(copy.box, box)
            if not volume(common):
                continue
            dtype = NUMPY_DTYPES[copy.source.stored.dtype]
            if common == box and dtype == out.dtype and _is_run(copy.source, common):
                self.read_run(copy.source, common, out)
            else:
                values = self.view(copy.source, common)
                self.cast(out[within(common, box)], values, copy.source, common)

    def cast(self, out: np.ndarray, values: np.ndarray, source: StoredSlice, box: Box) -> None:
        """Casts `values`, which are made of `box` of `source`, and counts what that loses."""
        self.losses.add(source, box, assign(out, values), out.dtype)


class BandBuffers(threading.local):
    """One reusable band per thread."""

    def __init__(self) -> None:
        self._raw = np.empty(BAND_BYTES, np.uint8)

    @property
    def raw(self) -> memoryview:
        """The band's bytes."""
        return self._raw.data

    def take(self, box: Box, dtype: np.dtype) -> np.ndarray:
        """An uninitialized `[blocks, rows, columns]` array for `box`."""
        num_bytes = volume(box) * dtype.itemsize
        if num_bytes > self._raw.nbytes:
            self._raw = np.empty(num_bytes, np.uint8)
        return self._raw[:num_bytes].view(dtype).reshape(extent(box))


def write_bands(
    write: Write, reader: Reader, buffers: BandBuffers, put: Callable[[int, np.ndarray], None]
) -> str:
    """Produces a target tensor's bytes in order.

    Args:
        write: the target and its sources.
        reader: where sources are read from.
        buffers: the thread's band.
        put: called with (byte offset within the tensor, contiguous band).

    Returns:
        The xxh3-128 checksum of the tensor's bytes, in hexadecimal.
    """
    dtype = NUMPY_DTYPES[write.target.stored.dtype]
    checksum, position = xxhash.xxh3_128(), 0
    for box in bands(write.target.piece.box, BAND_BYTES // dtype.itemsize):
        band = buffers.take(box, dtype)
        if write.is_padded:
            band.view(np.uint8)[...] = 0
        reader.fill(band, box, write.copies)
        checksum.update(band.reshape(-1).view(np.uint8).data)
        put(position, band)
        position += band.nbytes
    return checksum.hexdigest()


def stored_checksum(stored: StoredTensor) -> str:
    """The xxh3-128 checksum of a tensor's bytes as they are in its file; words where they end."""
    if not stored.path.exists():
        return "file is missing"
    fd = open_descriptor(stored.path)
    try:
        return _read_checksum(fd, stored)
    finally:
        os.close(fd)


_hashed = BandBuffers()  # new memory for each tensor costs more


def _read_checksum(fd: int, stored: StoredTensor) -> str:
    checksum, raw = xxhash.xxh3_128(), _hashed.raw
    at, end = stored.offset, stored.offset + stored.num_bytes
    while at < end:
        try:
            n = os.preadv(fd, [raw[: end - at]], at)
        except OSError as error:
            raise OSError(f"{stored.path}: cannot be read: {error.strerror}.") from None
        if not n:
            return "file ends early"
        checksum.update(raw[:n])
        at += n
    return checksum.hexdigest()


class SourceChecks:
    """Compares source tensors with the checksums they were written with, each of them once.

    A tensor is read for it just before its first use, so that the disk is read once: the copying
    then finds it in the page cache. Threads may share one.
    """

    def __init__(
        self,
        expected: Mapping[StoredTensor, Sequence[tuple[StoredTensor, str]]],
        way_out: str = "",
    ) -> None:
        """Nothing is read yet.

        Args:
            expected: the parts that a tensor was written in, with their checksums.
            way_out: ends the message about a damaged tensor.
        """
        self._left = dict(expected)
        self._way_out = way_out
        self._damaged: list[StoredTensor] = []

    def before(self, write: Write, reader: Reader) -> None:
        """Checks the tensors that `write` is the first to read."""
        for copy in write.copies:
            self._check(copy.source, reader)

    def finish(self, sources: Iterable[StoredSlice], reader: Reader) -> None:
        """Checks those of `sources` that no write read (replicas, or of an earlier run).

        Raises:
            DamagedError: tensors whose bytes changed since they were written, all named.
        """
        sources = tuple(sources)
        for held in sources:
            self._check(held, reader)
        self.raise_damaged(sources)

    def raise_damaged(self, sources: Iterable[StoredSlice]) -> None:
        """Ends the work where one of `sources` that was read is not as it was written.

        Raises:
            DamagedError: all of them named.
        """
        if self._damaged:
            raise DamagedError(
                f"{held.stored.path}: {held.name} does not have the checksum it was written with; "
                f"the file is damaged or was changed.{self._way_out}"
                for held in sources
                if held.stored in self._damaged
            )

    def _check(self, held: StoredSlice, reader: Reader) -> None:
        for part, expected in self._left.pop(held.stored, ()):  # whoever takes it checks it
            flat = ((0, 1), (0, 1), (0, prod(part.shape)))
            piece = TensorSlice(held.piece.tensor, flat, part.shape)
            if reader.checksum(StoredSlice(held.name, piece, part)) != expected:
                self._damaged.append(held.stored)


def allow_many_open_files() -> None:
    """Raises the soft limit of open files to the hard one: each source file takes two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _ended(held: StoredSlice) -> VerificationError:
    return VerificationError(
        f"{held.stored.path} became shorter while it was read ({held.name} is gone); something "
        "else is writing it."
    )


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """Index of `box` into an array that holds `outer`."""
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(box, outer, strict=True))


def _is_run(held: StoredSlice, box: Box) -> bool:
    """Whether `box` is one run of the stored bytes (rows of one block, all columns)."""
    blocks, _, columns = box
    whole = held.piece.box
    return columns == whole[2] and (blocks[1] - blocks[0] == 1 or box[1] == whole[1])


def _run_start(held: StoredSlice, box: Box) -> int:
    _, rows, columns = extent(held.piece.box)
    block, row, column = (a - c for (a, _), (c, _) in zip(box, held.piece.box, strict=True))
    element = (block * rows + row) * columns + column
    return held.stored.offset + element * NUMPY_DTYPES[held.stored.dtype].itemsize
