"""Dumped arrays by name: `.npy`, `.npz`, `.pt`, `.safetensors`, or folders of them.

Opening reads names, shapes and dtypes; the data is mapped when it is asked for (of an `.npz` read).
Nothing is unpickled: numpy with allow_pickle=False, torch with weights_only=True.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.lib import format as npy

from qwen2_ascend.checkpoint.formats.safetensors import read_header
from qwen2_ascend.checkpoint.formats.stored import NUMPY_DTYPES
from qwen2_ascend.comparison.statistics import dtype_name, is_comparable
from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.files import open_regular, reading

PRECISION = "computed_in"
"""Key of a safetensors file's metadata: bf16, fp32 ..."""


class Stored(NamedTuple):
    """One array in a file."""

    path: Path
    inner: str
    """Its name in the file; empty for the one array of an .npy, or a .pt of one tensor."""
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], np.ndarray] | None
    """None for a dtype that is not compared."""
    precision: str | None = None
    """What it was computed in, where the file says so and that is not its dtype: gradients of a
    bf16 run are added up in fp32."""

    @property
    def num_bytes(self) -> int:
        """About; dtypes that no checkpoint has count as one byte."""
        known = NUMPY_DTYPES.get(self.dtype)
        return math.prod(self.shape) * (known.itemsize if known else 1)


@dataclass(frozen=True, kw_only=True)
class Dump:
    """The arrays of a file, or of a folder's files."""

    path: Path
    arrays: tuple[Stored, ...]

    def by_full_name(self) -> dict[str, Stored]:
        """The arrays by the file's place, without its suffix, and the name in the file."""
        return {self._full_name(stored): stored for stored in self.arrays}

    def by_short_name(self) -> dict[str, Stored] | None:
        """The arrays by the name in the file, or the file's; None when two are then the same."""
        names = [stored.inner or self._file_name(stored) for stored in self.arrays]
        if max(Counter(names).values(), default=0) > 1:
            return None
        return dict(zip(names, self.arrays, strict=True))

    def _full_name(self, stored: Stored) -> str:
        if self.path.is_dir():
            return "/".join(filter(None, (self._file_name(stored), stored.inner)))
        return stored.inner or self._file_name(stored)

    def _file_name(self, stored: Stored) -> str:
        if stored.path == self.path:
            return self.path.stem
        return stored.path.relative_to(self.path).with_suffix("").as_posix()


def open_dumps(*paths: str | Path) -> list[Dump]:
    """Opens each as `open_dump` does, and reports all faults at once."""
    dumps, faults = [], []
    for path in paths:
        try:
            dumps.append(open_dump(path))
        except UserError as error:
            faults += error.faults
    raise_if(faults)
    return dumps


def open_dump(path: str | Path) -> Dump:
    """Opens a file or a folder (all files below it; hidden ones and other suffixes are left out).

    Raises:
        UserError: nothing to read, damaged files, arrays of Python objects, or two files of one
            name; every fault at once, naming its file.
    """
    path = Path(path)
    arrays, faults = [], []
    for file in _files(path):
        try:
            with reading(file):
                arrays += _READERS[file.suffix.lower()](file)
        except UserError as error:
            faults += error.faults
    raise_if(faults)
    if not arrays:
        raise UserError(f"{path}: holds no arrays.")
    dump = Dump(path=path, arrays=tuple(arrays))
    raise_if(_ambiguous(dump))
    return dump


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", name)]


def _files(path: Path) -> list[Path]:
    kinds = ", ".join(_READERS)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder.")
    if not path.is_dir():
        if path.suffix.lower() not in _READERS:
            raise UserError(f"{path}: not a dump; name a file of {kinds}, or a folder of them.")
        return [path]
    files = [
        file
        for file in sorted(path.rglob("*"), key=lambda file: natural_key(str(file)))
        if file.suffix.lower() in _READERS
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not files:
        raise UserError(f"{path}: holds no dump; files of {kinds} are read.")
    return files


def _ambiguous(dump: Dump) -> Iterator[str]:
    seen: dict[str, Stored] = {}
    for stored in dump.arrays:
        other = seen.setdefault(dump._full_name(stored), stored)
        if other is not stored:
            name = dump._full_name(stored)
            yield f"{other.path} and {stored.path} both hold {name!r}; keep one of them."


# -- numpy


def _read_npy(path: Path) -> list[Stored]:
    def load() -> np.ndarray:
        return _native(npy.open_memmap(path, mode="r"))

    with _readable(path, ".npy file"):
        with open_regular(path) as file:
            shape, dtype = _npy_header(file)
        if not dtype.hasobject:
            load()  # its length is that of the header
    return [_stored(path, "", shape, dtype, load)]


def _read_npz(path: Path) -> list[Stored]:
    def loader(name: str) -> Callable[[], np.ndarray]:
        def load() -> np.ndarray:
            with _readable(path, f"array {name!r}"), np.load(path, allow_pickle=False) as archive:
                return _native(archive[name])

        return load

    arrays = []
    with (
        _readable(path, ".npz file"),
        open_regular(path) as whole,
        zipfile.ZipFile(whole) as archive,
    ):
        for member in archive.namelist():
            with archive.open(member) as file:
                shape, dtype = _npy_header(file)
            name = member.removesuffix(".npy")
            arrays.append(_stored(path, name, shape, dtype, loader(name)))
    return arrays


def _npy_header(file: BinaryIO | Any) -> tuple[tuple[int, ...], np.dtype]:
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def _stored(
    path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype, load: Callable[[], np.ndarray]
) -> Stored:
    if dtype.hasobject:
        what = f"array {name!r}" if name else "the array"
        raise UserError(
            f"{path}: {what} is of Python objects, which would have to be unpickled; save it "
            "as numbers."
        )
    dtype = _native_dtype(dtype)
    return Stored(path, name, shape, dtype_name(dtype), load if is_comparable(dtype) else None)


def _native_dtype(dtype: np.dtype) -> np.dtype:
    """Numpy writes bf16, which it does not know, as two bytes of anything."""
    return NUMPY_DTYPES["bf16"] if dtype == np.dtype("V2") else dtype.newbyteorder("=")


def _native(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.dtype("V2"):
        return array.view(NUMPY_DTYPES["bf16"])
    return array.astype(array.dtype.newbyteorder("="), copy=False)


# -- safetensors


def _read_safetensors(path: Path) -> list[Stored]:
    def loader(offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Callable[[], np.ndarray]:
        def load() -> np.ndarray:
            if 0 in shape:
                return np.zeros(shape, dtype)
            return np.memmap(path, dtype, "r", offset, shape)

        return load

    header = read_header(path)
    precision = header.metadata.get(PRECISION)
    return [
        Stored(path, name, t.shape, t.dtype, load, precision)
        for name, t in sorted(header.tensors.items(), key=lambda item: natural_key(item[0]))
        for load in [loader(t.offset, t.shape, NUMPY_DTYPES[t.dtype])]
    ]


# -- torch


def _read_pt(path: Path) -> list[Stored]:
    from qwen2_ascend.comparison.torch_dumps import read_pt  # and torch

    with _readable(path, ".pt file"):
        return [Stored(path, *array) for array in read_pt(path)]


@contextmanager
def _readable(path: Path, what: str) -> Iterator[None]:
    """Makes a UserError of whatever a damaged file makes of numpy's or torch's reader."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()).split(". ")[0][:200].rstrip(".")
        reason = reason or type(error).__name__
        raise UserError(f"{path}: not a readable {what}: {reason}.") from None


_READERS: dict[str, Callable[[Path], list[Stored]]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".pt": _read_pt,
    ".pth": _read_pt,
    ".safetensors": _read_safetensors,
}
