"""megatron-core's "torch_dist" checkpoint folders, read and laid out in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qwen2_ascend.checkpoint.formats.stored import FileLayout, StoredTensor, TensorSpec


class Chunk(NamedTuple):
    """One stored box of a global tensor: its first element lies at `offsets`."""

    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: StoredTensor
    """The bytes; its shape is the box's, as many axes as `global_shape`."""


class ChunkSpec(NamedTuple):
    """A Chunk to be written."""

    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: TensorSpec


@dataclass(frozen=True, kw_only=True)
class TorchDistCheckpoint:
    """What one folder holds."""

    common: dict[str, Any]
    """The plain state of common.pt (args, iteration, ...), with StoredTensor leaves."""
    chunks: dict[str, list[Chunk]]
    """Every tensor by key, its chunks ordered by offsets."""
    objects: tuple[str, ...]
    """Keys of entries that are not tensors (RNG states, TE extra states); not decoded."""


class ChunkPlace(NamedTuple):
    """Where a chunk's bytes go: the file's name within the folder, and the offset in it."""

    file: str
    offset: int


@dataclass(frozen=True, kw_only=True)
class TorchDistLayout:
    """A folder to be."""

    files: dict[str, FileLayout]
    """By name: the .distcp files, and .metadata, common.pt, metadata.json complete."""
    places: dict[str, list[ChunkPlace]]
    """Of every chunk, keys and order as given to `layout_torch_dist`."""


def read(folder: str | Path) -> TorchDistCheckpoint:
    """Reads what a folder holds and where.

    Raises:
        UserError: a missing, short or damaged file, or a pickle that asks for anything unknown.
    """
    raise NotImplementedError


def layout_torch_dist(
    chunks: Mapping[str, Sequence[ChunkSpec]], common: Mapping[str, Any], num_files: int = 1
) -> TorchDistLayout:
    """Lays out the folder that megatron-core's dist_checkpointing would write.

    Args:
        chunks: every tensor's boxes, which must tile its global shape.
        common: what goes into common.pt; no tensors.
        num_files: over how many .distcp files the chunks are spread, evenly by bytes.
    """
    raise NotImplementedError
