"""Writes one rank's part of a checkpoint: its slices, at the places that a layout gives them.

A rank holds nothing besides what it writes: tensors on the CPU are written from where they lie, a
device's come over in bands, and for `--async-save` all of them are copied to the host once, into
memory that the next save uses again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash

from qwen2_ascend.checkpoint.formats.stored import FileLayout
from qwen2_ascend.checkpoint.manifest import file_checksum
from qwen2_ascend.checkpoint.writing import pwrite, reserve, start_writeback
from qwen2_ascend.dtypes import DTYPE_NAMES
from qwen2_ascend.files import naming

_BAND_BYTES = 4 << 20
_THREADS = 2

Checked = dict[str, dict[str, dict[str, Any]]]
"""What the manifest says of a tensor, by file and name: dtype, shape, offset, xxh3_128."""


class Written(NamedTuple):
    """What ranks have written."""

    tensors: Checked
    files: dict[str, str]
    """Checksums of whole files, by their places."""


class Store(NamedTuple):
    """A tensor and where it goes."""

    name: str
    """The name in the manifest; no two in a file are the same."""
    file: str
    """Its place in the iteration's folder."""
    offset: int
    """Where its first byte is in the file."""
    shape: tuple[int, ...]
    tensor: torch.Tensor
    """Contiguous, of any shape with as many elements, on any device."""
    dtype: torch.dtype | None = None
    """What it is written as; by default what it is."""

    @property
    def written_dtype(self) -> torch.dtype:
        return self.dtype or self.tensor.dtype

    @property
    def num_bytes(self) -> int:
        return self.tensor.numel() * self.written_dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class RankPart:
    """All that one rank writes into the folder of an iteration."""

    files: Mapping[str, FileLayout]
    """How long each file is, and the bytes between the tensors that this rank writes. Ranks may
    share a file: each makes it if it is not there yet."""
    stores: Sequence[Store] = ()
    whole: Sequence[str] = ()
    """Files that are there already, of which this rank makes the checksums."""

    def write(self, folder: Path) -> Written:
        """Writes and flushes everything.

        Raises:
            OSError: a file cannot be written.
        """
        written = Written({}, {name: file_checksum(folder / name) for name in self.whole})
        for name, layout in self.files.items():
            own = sorted((s for s in self.stores if s.file == name), key=lambda s: s.offset)
            if checked := _write_file(folder / name, layout, own):
                written.tensors[name] = checked
        return written


class HostCopies:
    """Memory on the host for one rank's tensors, kept from one save to the next."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []

    def take(self, part: RankPart) -> RankPart:
        """The same with its tensors copied, so that training may change them."""
        fits = [(s.tensor.dtype, s.tensor.numel()) for s in part.stores] == [
            (buffer.dtype, buffer.numel()) for buffer in self._buffers
        ]
        if not fits:
            self._buffers = [
                torch.empty(
                    store.tensor.numel(),
                    dtype=store.tensor.dtype,
                    pin_memory=store.tensor.device.type == "cuda",
                )
                for store in part.stores
            ]
        for buffer, store in zip(self._buffers, part.stores, strict=True):
            buffer.copy_(store.tensor.detach().reshape(-1))
        stores = [
            store._replace(tensor=buffer)
            for store, buffer in zip(part.stores, self._buffers, strict=True)
        ]
        return replace(part, stores=stores)


def _write_file(path: Path, layout: FileLayout, stores: Sequence[Store]) -> dict[str, Any]:
    path.parent.mkdir(exist_ok=True)
    with naming(path), ThreadPoolExecutor(_THREADS) as pool:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            reserve(fd, layout.total_bytes)
            for offset, data in layout.segments:
                pwrite(fd, memoryview(data), offset)
            checksums = list(pool.map(lambda store: _write_tensor(fd, store), stores))
            os.fsync(fd)
        finally:
            os.close(fd)
    return {
        store.name: {
            "dtype": DTYPE_NAMES[store.written_dtype],
            "shape": list(store.shape),
            "offset": store.offset,
            "xxh3_128": checksum,
        }
        for store, checksum in zip(stores, checksums, strict=True)
    }


def _write_tensor(fd: int, store: Store) -> str:
    checksum, position = xxhash.xxh3_128(), store.offset
    for band in _bands(store):
        checksum.update(band)
        pwrite(fd, band, position)
        start_writeback(fd, position, len(band))
        position += len(band)
    return checksum.hexdigest()


def _bands(store: Store) -> Iterator[memoryview]:
    """The tensor's bytes on the host as they are written, a few at a time."""
    flat, dtype = store.tensor.detach().reshape(-1), store.written_dtype
    ends = [*range(0, len(flat), _BAND_BYTES // dtype.itemsize), len(flat)]
    for start, stop in pairwise(ends):
        band = flat[start:stop].cpu().to(dtype).view(torch.uint8)
        yield memoryview(band.numpy().data)
