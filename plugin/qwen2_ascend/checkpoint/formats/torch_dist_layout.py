"""megatron-core's "torch_dist" checkpoint folders, laid out as `torch_dist` reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

from qwen2_ascend.checkpoint.formats import torch_pt
from qwen2_ascend.checkpoint.formats.pickles import (
    Call,
    DictItems,
    DType,
    Name,
    Record,
    write_pickle,
)
from qwen2_ascend.checkpoint.formats.stored import FileLayout, TensorSpec
from qwen2_ascend.checkpoint.formats.torch_dist import (
    FILESYSTEM,
    METADATA,
    Index,
    StorageInfo,
    is_inside,
)
from qwen2_ascend.checkpoint.formats.zips import ALIGNMENT

CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""metadata.json."""

_LINEARS = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
_OF_TRANSFORMER_ENGINE = ("self_attention.core_attention",)


class ChunkSpec(NamedTuple):
    """A Chunk to be written."""

    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: TensorSpec


class Entry(NamedTuple):
    """What a rank's file holds: a chunk of the tensor `key`, or, without one, an object."""

    key: str
    chunk: ChunkSpec | None
    info: StorageInfo


class ChunkPlace(NamedTuple):
    """Where a chunk's bytes go: the file's name within the folder, and the offset in it."""

    file: str
    offset: int


@dataclass(frozen=True, kw_only=True)
class TorchDistLayout:
    """A folder to be."""

    files: dict[str, FileLayout]
    """By name: the .distcp files, and common.pt, .metadata and metadata.json complete."""
    places: dict[str, list[ChunkPlace]]
    """Where every chunk goes, keys and order as given to `layout_torch_dist`."""


def extra_states(num_layers: int) -> list[str]:
    """The objects that a megatron-core Qwen2 asks for when it loads, besides its tensors."""
    layers = [
        f"decoder.layers.{module}._extra_state/shard_{layer}_{num_layers}"
        for layer in range(num_layers)
        for module in (*_LINEARS, *_OF_TRANSFORMER_ENGINE)
    ]
    return [*layers, "decoder.final_layernorm._extra_state/shard_0_1"]


def layout_torch_dist(
    chunks: Mapping[str, Sequence[ChunkSpec]],
    common: Mapping[str, Any],
    num_files: int = 1,
    objects: Iterable[str] = (),
) -> TorchDistLayout:
    """Lays out the folder that megatron-core's dist_checkpointing would write.

    Args:
        chunks: every tensor's boxes, which must tile its global shape.
        common: what goes into common.pt; no tensors.
        num_files: over how many .distcp files the chunks are spread, evenly by bytes; fewer are
            made when there are not so many chunks.
        objects: keys of objects that are [None]; see `extra_states`.
    """
    flat = [(key, chunk) for key, parts in chunks.items() for chunk in parts]
    writers = [RankFile(f"__{i}_0.distcp") for i in range(num_files)]
    for key in objects:
        writers[0].append_object(key)
    places: dict[str, list[ChunkPlace]] = {key: [] for key in chunks}
    files = _spread([chunk.tensor.num_bytes for _, chunk in flat], num_files)
    for (key, chunk), file in zip(flat, files, strict=True):
        places[key].append(writers[file].append_tensor(key, chunk))
    entries = [entry for writer in writers for entry in writer.entries]
    layouts = {writer.name: writer.layout() for writer in writers if writer.entries}
    for name, data in small_files(entries, common).items():
        layouts[name] = FileLayout(total_bytes=len(data), segments=((0, data),))
    return TorchDistLayout(files=layouts, places=places)


def small_files(
    entries: Iterable[Entry],
    common: Mapping[str, Any],
    tensors: Mapping[torch_pt.KeyPath, bytes] | None = None,
) -> dict[str, bytes]:
    """The files of a folder that belong to no rank: common.pt, .metadata and metadata.json.

    Args:
        entries: of every rank's file; the chunks of each tensor must tile its global shape.
        common: what goes into common.pt.
        tensors: the bytes of each TensorSpec in it, by its path.
    """
    return {
        "common.pt": _small_pt(dict(common), tensors=tensors or {}),
        ".metadata": _encode_metadata(entries),
        "metadata.json": json.dumps(CONFIG).encode(),
    }


class RankFile:
    """A .distcp file in the making.

    Attributes:
        name: the file's.
        entries: what it holds.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.entries: list[Entry] = []
        self._segments: list[tuple[int, bytes]] = []
        self._end = 0

    def append_tensor(self, key: str, chunk: ChunkSpec) -> ChunkPlace:
        """Makes room for a chunk of the tensor `key`; returns where its bytes go."""
        assert is_inside(chunk.global_shape, chunk.offsets, chunk.tensor.shape), (
            f"a chunk of {key} lies outside of its tensor"
        )
        layout = torch_pt.layout_pt(chunk.tensor)
        info = self._append(layout.total_bytes, layout.segments)
        self.entries.append(Entry(key, chunk, info))
        return ChunkPlace(self.name, info.offset + layout.offsets[()])

    def append_object(self, key: str, data: bytes | None = None) -> None:
        """Appends an object: what torch.save made of a list of it alone; by default [None]."""
        if data is None:
            data = _small_pt([None], "archive")
        self.entries.append(Entry(key, None, self._append(len(data), [(0, data)])))

    def _append(self, num_bytes: int, segments: Iterable[tuple[int, bytes]]) -> StorageInfo:
        """Each torch.save starts at a multiple of 64 bytes, so that its tensor does too."""
        start = self._end + -self._end % ALIGNMENT
        if start > self._end:
            self._segments.append((self._end, bytes(start - self._end)))
        self._segments += ((start + offset, data) for offset, data in segments)
        self._end = start + num_bytes
        return StorageInfo(self.name, start, num_bytes)

    def layout(self) -> FileLayout:
        """The file's length, and its bytes between the tensors."""
        return FileLayout(total_bytes=self._end, segments=tuple(self._segments))


def _spread(sizes: Sequence[int], num_files: int) -> Iterator[int]:
    """The file of each of `sizes`, runs of about equal bytes."""
    total = max(sum(sizes), 1)
    for end, size in zip(accumulate(sizes), sizes, strict=True):
        middle = end - (size + 1) // 2
        yield min(middle * num_files // total, num_files - 1)


def _small_pt(
    obj: Any, name: str = "common", tensors: Mapping[torch_pt.KeyPath, bytes] | None = None
) -> bytes:
    layout, tensors = torch_pt.layout_pt(obj, name), tensors or {}
    assert layout.offsets.keys() == tensors.keys(), f"tensors without bytes: {layout.offsets}"
    whole = bytearray(layout.total_bytes)
    placed = [(layout.offsets[path], data) for path, data in tensors.items()]
    for offset, data in (*layout.segments, *placed):
        whole[offset : offset + len(data)] = data
    return bytes(whole)


def _encode_metadata(entries: Iterable[Entry]) -> bytes:
    """`.metadata` as torch.distributed.checkpoint's FileSystemReader unpickles it."""
    chunks: dict[str, list[ChunkSpec]] = {}
    described: dict[str, Record] = {}
    stored: dict[Index, StorageInfo] = {}
    for key, chunk, info in entries:
        index = Index(key, None if chunk is None else tuple(chunk.offsets))
        assert index not in stored, f"two chunks of {key} at {index.offsets}"
        stored[index] = info
        if chunk is None:
            described[key] = Record(Name(METADATA, "BytesStorageMetadata"), {})
        else:
            chunks.setdefault(key, []).append(chunk)
    state = {
        "state_dict_metadata": {k: _tensor_record(v) for k, v in chunks.items()} | described,
        "planner_data": None,
        "storage_data": DictItems(
            [(_index_record(index), _info_record(info)) for index, info in stored.items()]
        ),
        "storage_meta": None,
        "version": "1.0.0",
    }
    return write_pickle(Record(Name(METADATA, "Metadata"), state))


def _tensor_record(parts: Sequence[ChunkSpec]) -> Record:
    """A TensorStorageMetadata."""
    first = parts[0]
    dtype = DType(torch_pt.DTYPES[first.tensor.dtype])
    same = all((c.global_shape, c.tensor.dtype) == (first[0], first.tensor.dtype) for c in parts)
    volume = sum(prod(chunk.tensor.shape) for chunk in parts)
    assert same and volume == prod(first.global_shape), f"chunks do not tile {first.global_shape}"
    layout = Call(Name("torch.serialization", "_get_layout"), ("torch.strided",))
    contiguous = Call(Name(METADATA, "_MEM_FORMAT_ENCODING"), (0,))
    properties = (dtype, layout, False, contiguous, False)
    return Record(
        Name(METADATA, "TensorStorageMetadata"),
        {
            "properties": Record(Name(METADATA, "TensorProperties"), properties),
            "size": _torch_size(first.global_shape),
            "chunks": [
                Record(
                    Name(METADATA, "ChunkStorageMetadata"),
                    {"offsets": _torch_size(c.offsets), "sizes": _torch_size(c.tensor.shape)},
                )
                for c in parts
            ],
        },
    )


def _index_record(index: Index) -> Record:
    offset = None if index.offsets is None else _torch_size(index.offsets)
    state = {"fqn": index.key, "offset": offset, "index": None}
    return Record(Name(METADATA, "MetadataIndex"), state)


def _info_record(info: StorageInfo) -> Record:
    state = {"relative_path": info.file, "offset": info.offset, "length": info.num_bytes}
    return Record(Name(FILESYSTEM, "_StorageInfo"), state)


def _torch_size(sizes: Sequence[int]) -> Call:
    return Call(Name("torch", "Size"), (tuple(sizes),))
