"""megatron-core's "torch_dist" checkpoint folders, read in place without torch.

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

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qwen2_ascend.checkpoint.formats import torch_pt
from qwen2_ascend.checkpoint.formats.pickles import (
    PLAIN,
    DType,
    Inert,
    InertKey,
    Maker,
    known_records,
    read_pickle,
)
from qwen2_ascend.checkpoint.formats.stored import StoredTensor
from qwen2_ascend.errors import UserError, raise_if, shown
from qwen2_ascend.files import open_regular, read_bytes, read_json, reading

MAX_METADATA_BYTES = 1 << 26
"""The largest `.metadata`; a chunk takes about 300 bytes in it."""
METADATA = "torch.distributed.checkpoint.metadata"
FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_INDEX = f"{METADATA}.MetadataIndex"
_MEGATRON_METADATA = "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata"
"""torch's Metadata with one field more; what some releases of megatron-core write."""


class Chunk(NamedTuple):
    """One stored box of a global tensor: its first element lies at `offsets`."""

    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: StoredTensor
    """The bytes; its shape is the box's, as many axes as `global_shape`."""


_COMMON_OBJECT = "common_state/shard_0_1"


@dataclass(frozen=True, kw_only=True)
class TorchDistCheckpoint:
    """What one folder holds."""

    common: dict[str, Any]
    """What every rank has alike (args, iteration, ...), with StoredTensor leaves."""
    chunks: dict[str, list[Chunk]]
    """Every tensor by key, its chunks ordered by offsets."""
    objects: tuple[str, ...]
    """Keys of entries that are not tensors (RNG states, extra states); see `read_object`."""


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


def read_common(folder: Path) -> dict[str, Any]:
    """What every rank has alike; as `read` finds it.

    Raises:
        UserError: it is missing or damaged, or its pickle asks for anything unknown.
    """
    return _common(folder, _read_metadata(folder / ".metadata")[2])


def _common(folder: Path, stored: dict[Index, StorageInfo]) -> dict[str, Any]:
    path = folder / "common.pt"
    info = stored.get(Index(_COMMON_OBJECT, None))
    if info is None or os.path.lexists(path):  # in megatron-core's order
        said, common = str(path), torch_pt.read(path)
    else:
        said, common = f"{folder}: {_COMMON_OBJECT}", _object(folder, _COMMON_OBJECT, info)
    if type(common) is not dict:
        raise UserError(f"{said}: holds {type(common).__name__}, not a dict.")
    return common


def read_object(folder: Path, key: str) -> Any:
    """What `torch_pt.read` makes of an entry that is not a tensor, which is a list of one.

    Raises:
        UserError: it is missing or damaged, or its pickle asks for anything unknown.
    """
    info = _read_metadata(folder / ".metadata")[2].get(Index(key, None))
    if info is None:
        raise UserError(f"{folder}: has no {key}; the folder is damaged.")
    return _object(folder, key, info)


def _object(folder: Path, key: str, info: StorageInfo) -> Any:
    raise_if(_file_faults(folder, [info]))
    path = folder / info.file
    with open_regular(path) as file:
        objects = torch_pt.read_part(file, path, info.offset, info.num_bytes)
    if type(objects) is not list or len(objects) != 1:
        raise UserError(f"{path}: {key} is no object of megatron-core's.")
    return objects[0]


# -- what .metadata says


class Index(NamedTuple):
    """One chunk, or one object, which has no offsets."""

    key: str
    offsets: tuple[int, ...] | None


class StorageInfo(NamedTuple):
    """A torch.save inside a .distcp file."""

    file: str
    offset: int
    num_bytes: int


class _Described(NamedTuple):
    """A tensor as .metadata describes it."""

    global_shape: tuple[int, ...]
    dtype: str
    chunks: dict[tuple[int, ...], tuple[int, ...]]
    """Shape by offsets."""


_KNOWN = (
    PLAIN
    | known_records(
        {
            METADATA: (
                *("Metadata", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
                *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
            ),
            FILESYSTEM: ("_StorageInfo", "_StoragePrefix"),
            "torch.serialization": ("_get_layout",),
            "pathlib": ("PosixPath",),
            "pathlib._local": ("PosixPath",),
            # the plans that megatron-core keeps to save faster the next time
            "torch.distributed.checkpoint.planner": (
                *("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
            ),
            "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
        }
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
) -> tuple[dict[str, _Described], tuple[str, ...], dict[Index, StorageInfo]]:
    """The tensors, the other keys, and where each chunk is, from `.metadata`."""
    with reading(path):
        metadata = read_pickle(read_bytes(path, MAX_METADATA_BYTES), str(path), _KNOWN)
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
    return isinstance(record, (Inert, InertKey)) and record.type_name == f"{METADATA}.{name}"


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


def _storage_infos(storage_data: Any) -> Iterator[tuple[Index, StorageInfo]]:
    for record, info in storage_data.items():
        index = _state(record, "MetadataIndex")
        if not isinstance(info, Inert) or info.type_name != f"{FILESYSTEM}._StorageInfo":
            raise ValueError("a chunk without a _StorageInfo")
        if info.state.get("transform_descriptors"):
            raise ValueError(f"{shown(index['fqn'])} is stored through a transform (compressed)")
        file, offset, length = (info.state[k] for k in ("relative_path", "offset", "length"))
        if type(file) is not str or "/" in file or file in ("", ".", ".."):
            raise ValueError(f"{shown(index['fqn'])} is in {shown(file)}, outside of the folder")
        _sizes((offset, length))
        offsets = None if index.get("offset") is None else _sizes(index["offset"])
        yield Index(index["fqn"], offsets), StorageInfo(file, offset, length)


def _sizes(numbers: Any) -> tuple[int, ...]:
    if type(numbers) is not tuple or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"{shown(numbers)} instead of sizes")
    return numbers


def _missing_chunks(
    tensors: Mapping[str, _Described], stored: Mapping[Index, StorageInfo]
) -> Iterator[str]:
    """Chunks that are nowhere stored, stored but not described, or outside of their tensor."""
    for key, tensor in tensors.items():
        for offsets, sizes in tensor.chunks.items():
            if Index(key, offsets) not in stored:
                yield f"{key} {list(offsets)} is in no file."
            if not is_inside(tensor.global_shape, offsets, sizes):
                yield f"{key} {list(offsets)} + {list(sizes)} is outside {tensor.global_shape}."
    for key, offsets in stored:
        if key in tensors and offsets not in tensors[key].chunks:
            yield f"{key} {offsets} is stored but not described."


def is_inside(shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether a box of `sizes` at `offsets` lies in a tensor of `shape`, and has its axes."""
    return len({len(shape), len(offsets), len(sizes)}) == 1 and all(
        start + n <= size for size, start, n in zip(shape, offsets, sizes, strict=True)
    )


# -- the .distcp files


def _file_faults(folder: Path, infos: Iterable[StorageInfo]) -> Iterator[str]:
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
    folder: Path, stored: Mapping[Index, StorageInfo]
) -> Iterator[tuple[Index, StoredTensor | UserError]]:
    """The tensor, or what is wrong with it, of each index; file after file."""
    by_file: dict[str, list[tuple[Index, StorageInfo]]] = {}
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
