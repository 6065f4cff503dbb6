"""megatron-core's "torch_dist" checkpoint folders, read and laid out in place without torch.

    metadata.json      which backends wrote it: {"sharded_backend": "torch_dist", ...}
    common.pt          a `.pt` of what every rank has alike: args, iteration, ...; 0.19 writes an
                       object common_state/shard_0_1 instead, which is read here, not written
    .metadata          a pickled torch.distributed.checkpoint Metadata: every tensor's global shape,
                       its chunks, and the (file, offset, length) of each chunk
    __RANK_N.distcp    torch.save files one after the other, one per chunk or object

What megatron-core 0.16.1 stores for Qwen2 (seen in folders it wrote at TP1, TP2, PP2 and TP2 PP2):

- One key per kind of tensor, without layer numbers: `decoder.layers.mlp.linear_fc2.weight` has the
  global shape [num_layers, h, f], and a chunk [1, h, f / tp] at (layer, 0, tp_rank * f / tp). With
  `non_homogeneous_layers` or `singleton_local_shards` in the save's metadata the keys have global
  layer numbers (`decoder.layers.3.mlp...`) and no such axis.
- `linear_fc1` is [num_layers, 2 f, h]: all of gate, then all of up; each rank stores two chunks,
  at rows tp_rank * f / tp and f + tp_rank * f / tp. (With `singleton_local_shards` two keys,
  `..._w` and `..._v`.)
- `linear_qkv` rows are in the order of the query groups, as in the mp_rank files; a rank's rows
  are one chunk. Norms are [num_layers, h].
- `embedding.word_embeddings.weight` and `output_layer.weight` are [padded vocabulary, h]. Another
  padding may be asked for at loading (`allow_shape_mismatch`): rows beyond are zero or dropped.
- Tied: there is no `output_layer.weight`; the last stage's copy is a replica of the embedding.
- Replicas (norms over TP ranks, everything over DP ranks) are stored once.
- The layer specs of megatron-core, local and Transformer Engine's alike, store the norms as
  `self_attention.linear_qkv.layer_norm_weight` and `mlp.linear_fc1.layer_norm_weight` (the local
  one by its `sharded_state_dict_keys_map`); a spec without that map as `input_layernorm.weight`
  and `pre_mlp_layernorm.weight`.
- Every linear layer has an object `KEY._extra_state/shard_LAYER_NUM-LAYERS` that holds [None]. A
  model asks for them when it loads, so a folder without them cannot be loaded (`extra_states`).
  One of Transformer Engine's modules also asks for the attention's and the last norm's; others
  leave what they do not ask for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from qwen2_ascend.checkpoint.formats import torch_pt
from qwen2_ascend.checkpoint.formats.pickles import (
    PLAIN,
    Call,
    DictItems,
    DType,
    Inert,
    InertKey,
    Maker,
    Name,
    Record,
    known_records,
    read_pickle,
    write_pickle,
)
from qwen2_ascend.checkpoint.formats.stored import FileLayout, StoredTensor, TensorSpec
from qwen2_ascend.checkpoint.formats.zips import ALIGNMENT
from qwen2_ascend.errors import UserError, raise_if, shown
from qwen2_ascend.files import open_regular, read_bytes, read_json

MAX_METADATA_BYTES = 1 << 26
"""The largest `.metadata`; a chunk takes about 300 bytes in it."""
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
_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_INDEX = f"{_METADATA}.MetadataIndex"
_MEGATRON_METADATA = "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata"
"""torch's Metadata with one field more; what some releases of megatron-core write."""


class Chunk(NamedTuple):
    """One stored box of a global tensor: its first element lies at `offsets`."""

    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: StoredTensor
    """The bytes; its shape is the box's, as many axes as `global_shape`."""


_COMMON_OBJECT = "common_state/shard_0_1"


class ChunkSpec(NamedTuple):
    """A Chunk to be written."""

    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: TensorSpec


@dataclass(frozen=True, kw_only=True)
class TorchDistCheckpoint:
    """What one folder holds."""

    common: dict[str, Any]
    """What every rank has alike (args, iteration, ...), with StoredTensor leaves."""
    chunks: dict[str, list[Chunk]]
    """Every tensor by key, its chunks ordered by offsets."""
    objects: tuple[str, ...]
    """Keys of entries that are not tensors (RNG states, extra states); see `read_object`."""


class ChunkPlace(NamedTuple):
    """Where a chunk's bytes go: the file's name within the folder, and the offset in it."""

    file: str
    offset: int


@dataclass(frozen=True, kw_only=True)
class TorchDistLayout:
    """A folder to be."""

    files: dict[str, FileLayout]
    """The .distcp files by name, and common.pt, .metadata and metadata.json complete."""
    places: dict[str, list[ChunkPlace]]
    """Every chunk's place, with keys and order as given to `layout_torch_dist`."""


def read(
    folder: str | Path, wanted: Callable[[str], bool] = lambda key: True
) -> TorchDistCheckpoint:
    """Reads what a folder holds and where.

    Args:
        folder: the folder of one iteration.
        wanted: whether a key's chunks are looked up (about 0.5 ms each); `chunks` holds no others.
            Missing and truncated files are found for all.

    Raises:
        UserError: a missing, short or damaged file, or a pickle that asks for anything unknown;
            every fault of the .distcp files at once.
    """
    folder = Path(folder)
    _check_config(folder / "metadata.json")
    tensors, objects, stored = _read_metadata(folder / ".metadata")
    common = _common(folder, stored)
    raise_if(_file_faults(folder, stored.values()))
    chunks: dict[str, list[Chunk]] = {key: [] for key in tensors if wanted(key)}
    faults = []
    for index, tensor in _read_tensors(folder, {i: stored[i] for i in stored if i.key in chunks}):
        if isinstance(tensor, UserError):
            faults += tensor.faults
            continue
        described, offsets = tensors[index.key], index.offsets or ()
        said = (described.chunks[offsets], described.dtype)
        if said != (tensor.shape, tensor.dtype):
            faults.append(
                f"{tensor.path}: chunk {list(offsets)} of {index.key} is {tensor.shape} "
                f"{tensor.dtype}; .metadata says {said[0]} {said[1]}."
            )
        chunks[index.key].append(Chunk(described.global_shape, offsets, tensor))
    raise_if(faults)
    for parts in chunks.values():
        parts.sort(key=lambda chunk: chunk.offsets)
    others = tuple(key for key in objects if key != _COMMON_OBJECT)
    return TorchDistCheckpoint(common=common, chunks=chunks, objects=others)


def read_common(folder: str | Path) -> dict[str, Any]:
    """What every rank has alike; as `read` finds it.

    Raises:
        UserError: it is missing or damaged, or its pickle asks for anything unknown.
    """
    folder = Path(folder)
    return _common(folder, _read_metadata(folder / ".metadata")[2])


def _common(folder: Path, stored: dict[_Index, _StorageInfo]) -> dict[str, Any]:
    path = folder / "common.pt"
    info = stored.get(_Index(_COMMON_OBJECT, None))
    if info is None or os.path.lexists(path):  # in megatron-core's order
        said, common = str(path), torch_pt.read(path)
    else:
        said, common = f"{folder}: {_COMMON_OBJECT}", _object(folder, _COMMON_OBJECT, info)
    if type(common) is not dict:
        raise UserError(f"{said}: holds {type(common).__name__}, not a dict.")
    return common


def read_object(folder: str | Path, key: str) -> Any:
    """What `torch_pt.read` makes of an entry that is not a tensor, which is a list of one.

    Raises:
        UserError: it is missing or damaged, or its pickle asks for anything unknown.
    """
    folder = Path(folder)
    info = _read_metadata(folder / ".metadata")[2].get(_Index(key, None))
    if info is None:
        raise UserError(f"{folder}: has no {key}; the folder is damaged.")
    return _object(folder, key, info)


def _object(folder: Path, key: str, info: _StorageInfo) -> Any:
    raise_if(_file_faults(folder, [info]))
    path = folder / info.file
    with open_regular(path) as file:
        objects = torch_pt.read_part(file, path, info.offset, info.num_bytes)
    if type(objects) is not list or len(objects) != 1:
        raise UserError(f"{path}: {key} is no object of megatron-core's.")
    return objects[0]


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
    layouts |= {name: _whole_file(data) for name, data in small_files(entries, common).items()}
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


# -- what .metadata says


class _Index(NamedTuple):
    """One chunk, or one object, which has no offsets."""

    key: str
    offsets: tuple[int, ...] | None


class _StorageInfo(NamedTuple):
    """A torch.save inside a .distcp file."""

    file: str
    offset: int
    num_bytes: int


class Entry(NamedTuple):
    """What a rank's file holds: a chunk of the tensor `key`, or, without one, an object."""

    key: str
    chunk: ChunkSpec | None
    info: _StorageInfo


class _Described(NamedTuple):
    """A tensor as .metadata describes it."""

    global_shape: tuple[int, ...]
    dtype: str
    chunks: dict[tuple[int, ...], tuple[int, ...]]
    """Shape by offsets."""


_KNOWN = (
    PLAIN
    | known_records(
        *(
            f"{_METADATA}.{name}"
            for name in (
                "Metadata",
                "TensorStorageMetadata",
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "TensorProperties",
                "StorageMeta",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        f"{_FILESYSTEM}._StorageInfo",
        f"{_FILESYSTEM}._StoragePrefix",
        "torch.serialization._get_layout",
        "pathlib.PosixPath",
        "pathlib._local.PosixPath",
        # the plans that megatron-core keeps to save faster the next time
        *(
            f"torch.distributed.checkpoint.planner.{name}"
            for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")
        ),
        "torch.distributed.checkpoint.planner.BytesIOWriteData",
        *(
            f"megatron.core.dist_checkpointing.strategies.torch.{name}"
            for name in ("MCoreMetadata", "MCoreSavePlan")
        ),
    )
    | torch_pt.TORCH_VALUES
    | {_INDEX: Maker(_INDEX, lambda: InertKey(_INDEX))}
)


def _check_config(path: Path) -> None:
    config = read_json(path)
    backend = config.get("sharded_backend") if isinstance(config, dict) else None
    version = config.get("sharded_backend_version") if isinstance(config, dict) else None
    if (backend, version) != ("torch_dist", 1):
        raise UserError(
            f"{path}: sharded_backend={shown(backend)} version {shown(version)}; only torch_dist "
            "version 1 is read. Save the checkpoint again with --ckpt-format torch_dist."
        )


def _read_metadata(
    path: Path,
) -> tuple[dict[str, _Described], tuple[str, ...], dict[_Index, _StorageInfo]]:
    """The tensors, the other keys, and where each chunk is, from `.metadata`."""
    try:
        data = read_bytes(path, MAX_METADATA_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from None
    metadata = read_pickle(data, str(path), _KNOWN)
    try:
        if isinstance(metadata, Inert) and metadata.type_name == _MEGATRON_METADATA:
            state = metadata.state
        else:
            state = _state(metadata, "Metadata")
        entries = dict(state["state_dict_metadata"])
        tensors, faults = {}, []
        for key, entry in entries.items():
            if not _is(entry, "BytesStorageMetadata"):
                tensors[key] = _describe(entry)
        stored = dict(_storage_infos(state["storage_data"]))
        faults += _missing_chunks(tensors, stored)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{path}: not a torch.distributed.checkpoint metadata: {error}.") from None
    raise_if(f"{path}: {fault}" for fault in faults)
    return tensors, tuple(key for key in entries if key not in tensors), stored


def _is(record: Any, name: str) -> bool:
    return isinstance(record, (Inert, InertKey)) and record.type_name == f"{_METADATA}.{name}"


def _state(record: Any, name: str) -> Any:
    if not _is(record, name):
        raise ValueError(f"a {type(record).__name__} instead of a {name}")
    return record.state


def _describe(entry: Any) -> _Described:
    state = _state(entry, "TensorStorageMetadata")
    dtype = _state(state["properties"], "TensorProperties")[0]
    if not isinstance(dtype, DType):
        raise ValueError("a tensor without a dtype")
    chunks = {}
    for record in state["chunks"]:
        chunk = _state(record, "ChunkStorageMetadata")
        chunks[_sizes(chunk["offsets"])] = _sizes(chunk["sizes"])
    return _Described(_sizes(state["size"]), torch_pt.OURS.get(dtype.name, dtype.name), chunks)


def _storage_infos(storage_data: Any) -> Iterator[tuple[_Index, _StorageInfo]]:
    for record, info in storage_data.items():
        index = _state(record, "MetadataIndex")
        if not isinstance(info, Inert) or info.type_name != f"{_FILESYSTEM}._StorageInfo":
            raise ValueError("a chunk without a _StorageInfo")
        if info.state.get("transform_descriptors"):
            raise ValueError(f"{shown(index['fqn'])} is stored through a transform (compressed)")
        file, offset, length = (info.state[k] for k in ("relative_path", "offset", "length"))
        if type(file) is not str or "/" in file or file in ("", ".", ".."):
            raise ValueError(f"{shown(index['fqn'])} is in {shown(file)}, outside of the folder")
        _sizes((offset, length))
        offsets = None if index.get("offset") is None else _sizes(index["offset"])
        yield _Index(index["fqn"], offsets), _StorageInfo(file, offset, length)


def _sizes(numbers: Any) -> tuple[int, ...]:
    if type(numbers) is not tuple or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"{shown(numbers)} instead of sizes")
    return numbers


def _missing_chunks(
    tensors: Mapping[str, _Described], stored: Mapping[_Index, _StorageInfo]
) -> Iterator[str]:
    """Chunks that are nowhere stored, stored but not described, or outside of their tensor."""
    for key, tensor in tensors.items():
        for offsets, sizes in tensor.chunks.items():
            if _Index(key, offsets) not in stored:
                yield f"{key} {list(offsets)} is in no file."
            if not _is_inside(ChunkSpec(tensor.global_shape, offsets, TensorSpec(sizes, "uint8"))):
                yield f"{key} {list(offsets)} + {list(sizes)} is outside {tensor.global_shape}."
    for key, offsets in stored:
        if key in tensors and offsets not in tensors[key].chunks:
            yield f"{key} {offsets} is stored but not described."


def _is_inside(chunk: ChunkSpec) -> bool:
    axes = (chunk.global_shape, chunk.offsets, chunk.tensor.shape)
    return len(set(map(len, axes))) == 1 and all(
        start + n <= size for size, start, n in zip(*axes, strict=True)
    )


# -- the .distcp files


def _file_faults(folder: Path, infos: Iterable[_StorageInfo]) -> Iterator[str]:
    """Files that are missing or shorter than `.metadata` says."""
    needed: dict[str, int] = {}
    for info in infos:
        needed[info.file] = max(needed.get(info.file, 0), info.offset + info.num_bytes)
    for name, num_bytes in needed.items():
        path = folder / name
        if not path.is_file():
            yield f"{path}: no such file, but .metadata names it; copy the folder again."
        elif (size := path.stat().st_size) < num_bytes:
            yield f"{path}: truncated, {size} of {num_bytes} bytes; copy it again."


def _read_tensors(
    folder: Path, stored: Mapping[_Index, _StorageInfo]
) -> Iterator[tuple[_Index, StoredTensor | UserError]]:
    """The tensor, or what is wrong with it, of each index; file after file."""
    by_file: dict[str, list[tuple[_Index, _StorageInfo]]] = {}
    for index, info in stored.items():
        by_file.setdefault(info.file, []).append((index, info))
    for name, items in by_file.items():
        path = folder / name
        with open_regular(path) as file:
            end = 0
            for index, info in sorted(items, key=lambda item: item[1].offset):
                try:
                    if info.offset < end:  # a small file could be read a million times
                        raise UserError(f"{path}: .metadata puts two chunks at byte {info.offset}.")
                    end = info.offset + info.num_bytes
                    tensor = torch_pt.read_part(file, path, info.offset, info.num_bytes)
                    if not isinstance(tensor, StoredTensor):
                        raise UserError(f"{path}: {index.key}: not a tensor at {info.offset}.")
                except UserError as error:
                    yield index, error
                else:
                    yield index, tensor


# -- writing


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
        assert _is_inside(chunk), f"a chunk of {key} lies outside of its tensor"
        layout = torch_pt.layout_pt(chunk.tensor)
        info = self._append(layout.total_bytes, layout.segments)
        self.entries.append(Entry(key, chunk, info))
        return ChunkPlace(self.name, info.offset + layout.offsets[()])

    def append_object(self, key: str, data: bytes | None = None) -> None:
        """Appends an object: what torch.save made of a list of it alone; by default [None]."""
        if data is None:
            data = _small_pt([None], "archive")
        self.entries.append(Entry(key, None, self._append(len(data), [(0, data)])))

    def _append(self, num_bytes: int, segments: Iterable[tuple[int, bytes]]) -> _StorageInfo:
        """Each torch.save starts at a multiple of 64 bytes, so that its tensor does too."""
        start = self._end + -self._end % ALIGNMENT
        if start > self._end:
            self._segments.append((self._end, bytes(start - self._end)))
        self._segments += ((start + offset, data) for offset, data in segments)
        self._end = start + num_bytes
        return _StorageInfo(self.name, start, num_bytes)

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


def _whole_file(data: bytes) -> FileLayout:
    return FileLayout(total_bytes=len(data), segments=((0, data),))


def _encode_metadata(entries: Iterable[Entry]) -> bytes:
    """`.metadata` as torch.distributed.checkpoint's FileSystemReader unpickles it."""
    chunks: dict[str, list[ChunkSpec]] = {}
    described: dict[str, Record] = {}
    stored: dict[_Index, _StorageInfo] = {}
    for key, chunk, info in entries:
        index = _Index(key, None if chunk is None else tuple(chunk.offsets))
        assert index not in stored, f"two chunks of {key} at {index.offsets}"
        stored[index] = info
        if chunk is None:
            described[key] = Record(Name(_METADATA, "BytesStorageMetadata"), {})
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
    return write_pickle(Record(Name(_METADATA, "Metadata"), state))


def _tensor_record(parts: Sequence[ChunkSpec]) -> Record:
    """A TensorStorageMetadata."""
    first = parts[0]
    dtype = DType(torch_pt.DTYPES[first.tensor.dtype])
    same = all((c.global_shape, c.tensor.dtype) == (first[0], first.tensor.dtype) for c in parts)
    volume = sum(prod(chunk.tensor.shape) for chunk in parts)
    assert same and volume == prod(first.global_shape), f"chunks do not tile {first.global_shape}"
    layout = Call(Name("torch.serialization", "_get_layout"), ("torch.strided",))
    contiguous = Call(Name(_METADATA, "_MEM_FORMAT_ENCODING"), (0,))
    properties = (dtype, layout, False, contiguous, False)
    return Record(
        Name(_METADATA, "TensorStorageMetadata"),
        {
            "properties": Record(Name(_METADATA, "TensorProperties"), properties),
            "size": _torch_size(first.global_shape),
            "chunks": [
                Record(
                    Name(_METADATA, "ChunkStorageMetadata"),
                    {"offsets": _torch_size(c.offsets), "sizes": _torch_size(c.tensor.shape)},
                )
                for c in parts
            ],
        },
    )


def _index_record(index: _Index) -> Record:
    offset = None if index.offsets is None else _torch_size(index.offsets)
    state = {"fqn": index.key, "offset": offset, "index": None}
    return Record(Name(_METADATA, "MetadataIndex"), state)


def _info_record(info: _StorageInfo) -> Record:
    state = {"relative_path": info.file, "offset": info.offset, "length": info.num_bytes}
    return Record(Name(_FILESYSTEM, "_StorageInfo"), state)


def _torch_size(sizes: Sequence[int]) -> Call:
    return Call(Name("torch", "Size"), (tuple(sizes),))
