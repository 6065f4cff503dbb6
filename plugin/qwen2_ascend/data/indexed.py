"""Megatron's indexed datasets (`PREFIX.bin` and `PREFIX.idx`), through megatron-core itself."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from qwen2_ascend.errors import UserError

with warnings.catch_warnings():
    # importing megatron.core complains about the absence of CUDA-only packages
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import (
        DType,
        IndexedDataset,
        IndexedDatasetBuilder,
    )

__all__ = [
    "DType",
    "IndexedDataset",
    "IndexedDatasetBuilder",
    "fingerprint",
    "open_indexed",
    "sample_documents",
]

HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, code of the dtype, number of sequences, number of documents and one."""
EMPTY_HEADER = bytes(HEADER.size)
SAMPLED_BLOCKS, SAMPLED_BYTES = 64, 4096


def open_indexed(prefix: str | Path) -> Any:
    """The indexed dataset at `prefix`, checked as far as that costs no reading of the data.

    Raises:
        UserError: a file is missing, is not what it should be, or does not fit the other.
    """
    prefix = str(prefix)
    for suffix in (".bin", ".idx"):
        if not Path(prefix + suffix).is_file():
            raise UserError(f"{prefix}{suffix}: no such file; {_prefix_hint(prefix)}")
    if Path(prefix + ".bin").stat().st_size == 0:
        raise UserError(f"{prefix}.bin is empty; preprocess the data again.")
    _check_index(f"{prefix}.idx")
    dataset = IndexedDataset(prefix)
    expected = int(dataset.index.sequence_pointers[-1]) + (
        int(dataset.sequence_lengths[-1]) * DType.size(dataset.index.dtype)
    )
    if (found := Path(prefix + ".bin").stat().st_size) != expected:
        raise UserError(
            f"{prefix}.bin has {found} bytes, {prefix}.idx describes {expected}; "
            "they are not of one run, or the copy is not complete."
        )
    return dataset


def _check_index(path: str) -> None:
    """Refuses what IndexedDataset would stumble over: by its own failed asserts, noisily."""
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
    whole = len(header) == HEADER.size
    magic, version, code, sequences, documents = HEADER.unpack(header if whole else EMPTY_HEADER)
    if magic != b"MMIDIDX\0\0" or version != 1 or code not in [dtype.value for dtype in DType]:
        raise UserError(f"{path} is not an index of Megatron's (version 1).")
    expected = HEADER.size + sequences * (4 + 8) + documents * 8
    if (found := Path(path).stat().st_size) < expected:
        raise UserError(f"{path} has {found} bytes and should have {expected}; it was cut short.")
    if not sequences:
        raise UserError(f"{path} holds no document.")


def _prefix_hint(prefix: str) -> str:
    path = Path(prefix)
    if path.suffix in (".bin", ".idx"):
        return f"give the prefix without {path.suffix}: {path.with_suffix('')}"
    near = sorted(p.stem for p in path.parent.glob(f"{path.name}*.idx"))
    if near:
        return f"in {path.parent} there is {', '.join(near[:5])}."
    return "give the prefix of a .bin/.idx pair, as qwen2-ascend preprocess writes it."


def fingerprint(prefix: str | Path) -> str:
    """A short hash that changes when the documents' lengths do.

    megatron-core names its cached sample indices after the path alone, so data that was
    preprocessed again would be read through the old data's indices.
    """
    hashed = xxhash.xxh3_64(str(Path(f"{prefix}.bin").stat().st_size).encode())
    index = np.memmap(f"{prefix}.idx", mode="r")
    step = max(SAMPLED_BYTES, len(index) // SAMPLED_BLOCKS)
    hashed.update(str(len(index)).encode())
    for start in range(0, len(index), step):
        hashed.update(index[start : start + SAMPLED_BYTES].tobytes())
    return hashed.hexdigest()


def sample_documents(dataset: Any, num_documents: int = 128) -> list[np.ndarray]:
    """Up to `num_documents` documents' tokens, evenly spread, the first among them."""
    step = -(-len(dataset) // num_documents) or 1
    # copies: a view outlives the dataset's memory map and then crashes the process
    return [np.array(dataset[i]) for i in range(0, len(dataset), step)]
