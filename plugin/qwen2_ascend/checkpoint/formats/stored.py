"""StoredTensor: a tensor as a byte range of a file, the common word of all formats."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from qwen2_ascend.files import open_regular

NUMPY_DTYPES: dict[str, np.dtype] = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
    "fp64": np.dtype(np.float64),
    **{name: np.dtype(name) for name in ("int8", "uint8", "int32", "int64", "bool")},
}
"""Every dtype a checkpoint may hold."""
WEIGHT_DTYPES = ("bf16", "fp16", "fp32")

MAX_AXES = 64
"""PyTorch's and numpy's bound."""


def is_size(number: Any) -> bool:
    """Whether a value from a file can be a size or an offset."""
    return type(number) is int and 0 <= number < 2**63


def is_shape(numbers: Any) -> bool:
    """Whether a value from a file can be a shape: a list or tuple of sizes."""
    return (
        type(numbers) in (tuple, list) and len(numbers) <= MAX_AXES and all(map(is_size, numbers))
    )


class TensorSpec(NamedTuple):
    """A tensor to be written: shape and dtype (a key of NUMPY_DTYPES), no data yet."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * NUMPY_DTYPES[self.dtype].itemsize


class StoredTensor(NamedTuple):
    """A row-major tensor at `offset` bytes into the file `path`."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return TensorSpec(self.shape, self.dtype).num_bytes

    def array(self) -> np.ndarray:
        """Its values, read at once."""
        with open_regular(self.path) as file:
            file.seek(self.offset)
            data = file.read(self.num_bytes)
        return np.frombuffer(data, NUMPY_DTYPES[self.dtype]).reshape(self.shape)


@dataclass(frozen=True, kw_only=True)
class FileLayout:
    """A file to be: create it with `total_bytes`, write `segments`, then fill the tensors."""

    total_bytes: int
    segments: tuple[tuple[int, bytes], ...]
    """(file offset, bytes) of everything that is not tensor data."""
