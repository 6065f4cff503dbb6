"""Megatron's indexed datasets (`PREFIX.bin` and `PREFIX.idx`), through megatron-core itself."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from qwen2_ascend.data.index_files import check_indexed
from qwen2_ascend.errors import UserError
from qwen2_ascend.files import read_json
from qwen2_ascend.runtime import absent_triton

absent_triton.lend()
with warnings.catch_warnings():
    # importing megatron.core complains about the absence of CUDA-only packages
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.indexed_dataset import (
        IndexedDatasetBuilder as IndexedDatasetBuilder,
    )

SAMPLED_BLOCKS, SAMPLED_BYTES = 64, 4096
CHECKED_SEQUENCES = 1 << 20


def open_indexed(prefix: str | Path) -> Any:
    """The indexed dataset at `prefix`, checked as far as that costs no reading of the data.

    Raises:
        UserError: a file is missing, is not what it should be, or does not fit the other.
    """
    check_indexed(prefix)
    dataset = IndexedDataset(str(prefix))
    _check_places(prefix, dataset)
    return dataset


def _check_places(prefix: str | Path, dataset: Any) -> None:
    """Whether each sequence lies in the .bin; block by block, since an index may be large.

    Raises:
        UserError: one does not.
    """
    end, itemsize = Path(f"{prefix}.bin").stat().st_size, dataset.index.dtype_size
    for start in range(0, len(dataset), CHECKED_SEQUENCES):
        block = slice(start, start + CHECKED_SEQUENCES)
        lengths = dataset.index.sequence_lengths[block].astype(np.int64)
        pointers = dataset.index.sequence_pointers[block]
        inside = (lengths >= 0) & (pointers >= 0) & (pointers <= end - lengths * itemsize)
        if not inside.all():
            i = int(np.argmin(inside))
            raise UserError(
                f"{prefix}.idx is damaged: sequence {start + i} has {lengths[i]} tokens at byte "
                f"{pointers[i]} of {end}; preprocess the data again, or copy it again."
            )


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


def largest_token(prefix: str | Path) -> int | None:
    """The largest token of a dataset, as the preparation noted it; None where it did not."""
    try:
        value = read_json(f"{prefix}.json")["largest_token"]
    except (UserError, KeyError, TypeError):
        return None
    return value if type(value) is int else None


def sample_documents(dataset: Any, num_documents: int = 128) -> list[np.ndarray]:
    """The tokens of up to `num_documents` documents, evenly spread, the first among them."""
    step = -(-len(dataset) // num_documents) or 1
    # copies: a view outlives the dataset's memory map and then crashes the process
    return [np.array(dataset[i]) for i in range(0, len(dataset), step)]
