"""Megatron's indexed datasets (`PREFIX.bin` and `PREFIX.idx`), through megatron-core itself."""

from __future__ import annotations

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
    try:
        dataset = IndexedDataset(prefix)
    except (AssertionError, ValueError, OSError, IndexError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{prefix}.idx is not an index of Megatron's: {text}") from None
    expected = int(dataset.index.sequence_pointers[-1]) + (
        int(dataset.sequence_lengths[-1]) * DType.size(dataset.index.dtype)
    )
    if (found := Path(prefix + ".bin").stat().st_size) != expected:
        raise UserError(
            f"{prefix}.bin has {found} bytes, {prefix}.idx describes {expected}; "
            "they are not of one run, or the copy is not complete."
        )
    return dataset


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
