"""Reads a written checkpoint back and compares every byte with its source."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash

from qwen2_ascend.checkpoint.adapter import Adapter
from qwen2_ascend.checkpoint.casting import CastLosses
from qwen2_ascend.checkpoint.copying import BAND_BYTES, BandBuffers, Reader
from qwen2_ascend.checkpoint.formats.stored import NUMPY_DTYPES, StoredTensor
from qwen2_ascend.checkpoint.plan import StoredSlice, Write, bands, make_plan
from qwen2_ascend.checkpoint.readers.base import Source
from qwen2_ascend.errors import UserError, VerificationError, raise_if
from qwen2_ascend.files import open_descriptor


def verify(
    source: Source,
    written: Source,
    *,
    checksums: Mapping[StoredTensor, str],
    workers: int,
    progress: Callable[[int], object],
    open_reader: Callable[[], Reader],
) -> None:
    """Compares `written`, opened afresh from its files, with `source`.

    The written tensors are found through their own headers, not through what the writer believes.
    The page cache is dropped first where the kernel allows it, so that the disk is read.

    Args:
        source: what was converted.
        written: the result.
        checksums: what the result's manifest says of each of its tensors.
        workers: threads.
        progress: called with the bytes of each tensor that was compared.
        open_reader: makes what the source is read with.

    Raises:
        VerificationError: names the tensors that differ.
    """
    for path in written.files:
        _drop_cache(path)
    plan = make_plan(source.held, written.held, source.config.vocab_size)
    expected, found = BandBuffers(), BandBuffers()
    with open_reader() as reader, ThreadPoolExecutor(workers) as pool:

        def differs(write: Write) -> str | None:
            checksum = _checksum_if_equal(write, reader, expected, found)
            equal = checksum is not None and checksum == checksums.get(write.target.stored)
            progress(write.target.stored.num_bytes)
            return None if equal else f"{write.target.stored.path}: {write.target.name}"

        wrong = [name for name in pool.map(differs, plan.writes) if name]
    if wrong:
        raise VerificationError(f"{len(wrong)} tensors differ from the source: {wrong[:20]}")


def check_replicas(replicas: Iterable[tuple[StoredSlice, StoredSlice]]) -> None:
    """Tensors that are stored twice must be equal, or one of them would be lost in silence.

    Raises:
        UserError: those that differ, all named.
    """
    faults = []
    with Reader() as reader:
        for one, other in replicas:
            same_dtype = one.stored.dtype == other.stored.dtype
            if not same_dtype or not _equal_tensors(one, other, reader):
                faults.append(
                    f"{other.stored.path}: {other.name} differs from {one.name} in "
                    f"{one.stored.path}, of which it should be a copy; if that is known, "
                    "--ignore-replica-mismatch takes the latter."
                )
    raise_if(faults)


def check_base(source: Source, adapter: Adapter) -> None:
    """What an adapter was trained on, where it is stored with it, must be what it is merged into.

    Raises:
        UserError: names the tensors that differ.
    """
    plan = make_plan(source.held, adapter.base, source.config.vocab_size)
    expected, found = BandBuffers(), BandBuffers()
    with Reader(CastLosses(allow_overflow=True)) as reader:
        wrong = [
            write.target.name
            for write in plan.writes
            if _checksum_if_equal(write, reader, expected, found) is None
        ]
    if wrong:
        raise UserError(
            f"{adapter.folder}: {len(wrong)} of the weights that the adapter was trained on, such "
            f"as {wrong[0]}, differ from those of {source.folder}; merge it into its own model."
        )


def _checksum_if_equal(
    write: Write, reader: Reader, expected_bands: BandBuffers, found_bands: BandBuffers
) -> str | None:
    """The checksum of a written tensor, or None where it is not what its sources make."""
    target, checksum = write.target, xxhash.xxh3_128()
    dtype = NUMPY_DTYPES[target.stored.dtype]
    for box in bands(target.piece.box, BAND_BYTES // dtype.itemsize):
        expected, found = expected_bands.take(box, dtype), found_bands.take(box, dtype)
        if write.is_padded:
            expected.view(np.uint8)[...] = 0
        reader.fill(expected, box, write.copies)
        reader.read_run(target, box, found)
        if not _same_bytes(expected, found):
            return None
        checksum.update(found.reshape(-1).view(np.uint8).data)
    return checksum.hexdigest()


def _equal_tensors(one: StoredSlice, other: StoredSlice, reader: Reader) -> bool:
    itemsize = NUMPY_DTYPES[one.stored.dtype].itemsize
    return all(
        _same_bytes(reader.view(one, box), reader.view(other, box))
        for box in bands(one.piece.box, BAND_BYTES // itemsize)
    )


def _same_bytes(one: np.ndarray, other: np.ndarray) -> bool:
    raw = np.dtype(f"u{one.dtype.itemsize}")  # NaNs are compared as bits too
    return np.array_equal(one.view(raw), other.view(raw))


def _drop_cache(path: Path) -> None:
    fd = open_descriptor(path)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
