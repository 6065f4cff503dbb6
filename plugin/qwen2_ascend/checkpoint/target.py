"""Lays out the files of a checkpoint to be written: names, sizes, small bytes, tensor places.

Nothing is written here. A target is a list of files (how long, and every byte that is not tensor
data) and a list of held tensors inside them, which the plan fills.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2_ascend.checkpoint.formats import hugging_face, megatron, torch_pt
from qwen2_ascend.checkpoint.formats.stored import FileLayout, StoredTensor, TensorSpec
from qwen2_ascend.checkpoint.formats.torch_dist_layout import (
    ChunkSpec,
    extra_states,
    layout_torch_dist,
)
from qwen2_ascend.checkpoint.megatron_args import CHECKPOINT_FORMATS, ITERATION, megatron_args
from qwen2_ascend.checkpoint.plan import PlanError, StoredSlice
from qwen2_ascend.checkpoint.rules import (
    BY_BLOCKS,
    Box,
    Rule,
    Shard,
    TensorSlice,
    hugging_face_pieces,
    megatron_pieces,
    qwen2_rules,
)
from qwen2_ascend.config import DTYPES, Qwen2Config
from qwen2_ascend.errors import raise_if
from qwen2_ascend.files import links_out, read_bytes, regular_files
from qwen2_ascend.parallel import ParallelLayout

_MAX_ALIGNMENT = 4096
_Files = tuple[list[StoredSlice], Mapping[Path, FileLayout]]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A checkpoint folder to be. Paths are relative to it."""

    kind: str
    format: str
    held: tuple[StoredSlice, ...]
    files: Mapping[Path, FileLayout]
    small_files: Mapping[Path, bytes]
    """Files that are written whole before the folder is published: config, index."""
    tracker: tuple[Path, bytes] | None
    """The file that is written last: latest_checkpointed_iteration.txt."""

    @property
    def total_bytes(self) -> int:
        small = sum(map(len, self.small_files.values()))
        return small + sum(file.total_bytes for file in self.files.values())


def hugging_face_target(
    config: Qwen2Config,
    dtype: str,
    max_shard_bytes: int,
    side_files: Sequence[Path],
    marks: Mapping[str, str] | None = None,
) -> Target:
    """A Hugging Face folder: safetensors of at most `max_shard_bytes`, index, side files.

    `marks` go into the weight files' metadata.
    """
    pieces = hugging_face_pieces(config)
    specs = {name: TensorSpec(piece.shape, dtype) for name, piece in pieces.items()}
    weights = hugging_face.plan_files(specs, max_shard_bytes, marks)
    small = read_side_files(side_files, dtype)
    if (index := hugging_face.index_json(weights)) is not None:
        small[Path(hugging_face.INDEX_FILE)] = index
    return Target(
        kind="hf",
        format="safetensors",
        held=tuple(one for file in weights for one in _held_in(file, Path(), pieces)),
        files={Path(file.name): file.layout for file in weights},
        small_files=small,
        tracker=None,
    )


def megatron_target(
    config: Qwen2Config,
    layout: ParallelLayout,
    padded_vocab_size: int,
    dtype: str,
    save_format: str,
    side_files: Sequence[Path],
    marks: Mapping[str, str] | None = None,
) -> Target:
    """A Megatron folder in one of the formats "megatron", "safetensors", "torch_dist".

    `marks` go into the training arguments, or into the weight files' metadata.
    """
    folder = Path(f"iter_{ITERATION:07d}")
    shards = megatron_pieces(config, layout, padded_vocab_size)
    args = megatron_args(config, layout, padded_vocab_size, dtype)
    vars(args).update(marks or {}, ckpt_format=CHECKPOINT_FORMATS.get(save_format))
    if save_format == "torch_dist":
        held, files = _torch_dist_files(folder, config, shards, padded_vocab_size, dtype, args)
    elif save_format == "safetensors":
        held, files = _safetensors_files(folder, layout, shards, dtype, marks)
    else:
        held, files = _pt_files(folder, layout, shards, dtype, args)
    return Target(
        kind="mg",
        format=save_format,
        held=tuple(held),
        files=files,
        small_files=read_side_files(side_files, dtype),
        tracker=(Path(megatron.TRACKER_FILE), str(ITERATION).encode()),
    )


def check_files(target: Target) -> None:
    """Raises PlanError unless tensors and the bytes between them tile every file exactly once.

    Gaps of an alignment are left as the zeros that a new file has.
    """
    names = Counter((held.stored.path, held.name) for held in target.held)
    if twice := [f"{path}: {name}" for (path, name), n in names.items() if n > 1]:
        raise PlanError(f"names that are not unique in their file: {twice[:5]}")
    ranges = {
        path: [(start, start + len(data)) for start, data in file.segments]
        for path, file in target.files.items()
    }
    for held in target.held:
        stored = held.stored
        ranges[stored.path].append((stored.offset, stored.offset + stored.num_bytes))
    for path, file in target.files.items():
        end = 0
        for start, stop in sorted(ranges[path]):
            if not end <= start < end + _MAX_ALIGNMENT:
                raise PlanError(f"{path}: bytes {end}..{start} are written twice or never")
            end = stop
        if not end <= file.total_bytes < end + _MAX_ALIGNMENT:
            raise PlanError(f"{path}: {end} bytes are laid out, not {file.total_bytes}")


def read_side_files(side_files: Sequence[Path], dtype: str) -> dict[Path, bytes]:
    """The files carried along, byte for byte but for config.json's dtype when that changes.

    Raises:
        UserError: one is a link that leads out of its folder, which would be copied from there.
    """
    found: dict[Path, bytes] = {}
    raise_if(fault for path in side_files for fault in links_out(path.parent, (path,)))
    for path in side_files:
        for file in regular_files(path):
            found[file.relative_to(path.parent)] = read_bytes(file)
    config = Path("config.json")
    if config in found:
        found[config] = _with_dtype(found[config], dtype)
    return found


def _with_dtype(config_json: bytes, dtype: str) -> bytes:
    raw: dict[str, Any] = json.loads(config_json)
    name = next(long for long, short in DTYPES.items() if short == dtype)
    if Qwen2Config.from_dict(raw).dtype == dtype:
        return config_json
    keys = [key for key in ("torch_dtype", "dtype") if key in raw] or ["torch_dtype"]
    changed = raw | dict.fromkeys(keys, name)
    return (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()


def _pt_files(
    folder: Path,
    layout: ParallelLayout,
    shards: Mapping[Shard, Mapping[str, TensorSlice]],
    dtype: str,
    args: Namespace,
) -> _Files:
    num_chunks = 1 + max(shard.chunk for shard in shards)
    held, files = [], {}
    for tp_rank in range(layout.tp):
        for pp_stage in range(layout.pp):
            models = {
                megatron.model_key(chunk, num_chunks): shards[Shard(tp_rank, pp_stage, chunk)]
                for chunk in range(num_chunks)
            }
            state = {"args": args, "checkpoint_version": 3.0, "iteration": ITERATION} | {
                key: OrderedDict((n, TensorSpec(p.shape, dtype)) for n, p in pieces.items())
                for key, pieces in models.items()
            }
            rank = megatron.rank_folder_name(tp_rank, pp_stage, layout.pp)
            path = folder / rank / megatron.PT_FILE
            files[path] = pt = torch_pt.layout_pt(state, name=path.stem)
            held += [
                StoredSlice(
                    name if num_chunks == 1 else f"{key}/{name}",  # chunks repeat the names
                    piece,
                    StoredTensor(path, pt.offsets[key, name], piece.shape, dtype),
                )
                for key, pieces in models.items()
                for name, piece in pieces.items()
            ]
    return held, files


def _safetensors_files(
    folder: Path,
    layout: ParallelLayout,
    shards: Mapping[Shard, Mapping[str, TensorSlice]],
    dtype: str,
    marks: Mapping[str, str] | None,
) -> _Files:
    num_chunks = 1 + max(shard.chunk for shard in shards)
    held, files = [], {}
    for shard, pieces in shards.items():
        specs = {name: TensorSpec(piece.shape, dtype) for name, piece in pieces.items()}
        name = f"{megatron.model_key(shard.chunk, num_chunks)}.safetensors"
        file = hugging_face.weight_file(name, specs, marks)
        rank = folder / megatron.rank_folder_name(shard.tp_rank, shard.pp_stage, layout.pp)
        files[rank / name] = file.layout
        held += _held_in(file, rank, pieces)
    return held, files


def _held_in(
    file: hugging_face.WeightFile, folder: Path, pieces: Mapping[str, TensorSlice]
) -> Iterator[StoredSlice]:
    """The tensors of a safetensors file in `folder`."""
    for name, (offset, spec) in file.tensors.items():
        yield StoredSlice(name, pieces[name], StoredTensor(folder / file.name, offset, *spec))


def _torch_dist_files(
    folder: Path,
    config: Qwen2Config,
    shards: Mapping[Shard, Mapping[str, TensorSlice]],
    padded_vocab_size: int,
    dtype: str,
    args: Namespace,
) -> _Files:
    """Chunks are cut as the ranks are, each once; replicas are not stored twice."""
    rules = {rule.megatron: rule for rule in qwen2_rules(config, padded_vocab_size)}
    chunks: dict[str, list[ChunkSpec]] = {}
    pieces: dict[str, list[TensorSlice]] = {}
    seen: set[tuple[str, Box]] = set()
    for piece in (piece for shard in shards.values() for piece in shard.values()):
        for part in _one_range_each(piece, rules):
            if (part.tensor, part.box) in seen:
                continue
            seen.add((part.tensor, part.box))
            key, spec = torch_dist_chunk(part, rules, config.num_layers, dtype)
            chunks.setdefault(key, []).append(spec)
            pieces.setdefault(key, []).append(part)
    common = {"args": args, "checkpoint_version": 3.0, "iteration": ITERATION}
    num_ranks = len({shard[:2] for shard in shards})
    laid_out = layout_torch_dist(
        chunks, common, num_files=num_ranks, objects=extra_states(config.num_layers)
    )
    held = [
        StoredSlice(
            f"{key}[{','.join(map(str, spec.offsets))}]",
            part,
            StoredTensor(folder / place.file, place.offset, part.shape, dtype),
        )
        for key, parts in pieces.items()
        for part, spec, place in zip(parts, chunks[key], laid_out.places[key], strict=True)
    ]
    return held, {folder / name: file for name, file in laid_out.files.items()}


def torch_dist_chunk(
    part: TensorSlice, rules: Mapping[str, Rule], num_layers: int, dtype: str
) -> tuple[str, ChunkSpec]:
    """The key under which torch_dist keeps a piece, and the chunk of that key which it is.

    Args:
        part: one range of the whole tensor's rows, or a part of one row.
        rules: by their Megatron names.
        num_layers: layers of the whole model.
        dtype: the dtype of the chunk.
    """
    rule, layer = rule_of(part, rules)
    (block, _), (row, _), (column, _) = part.box
    offsets: tuple[int, ...] = (block * rule.view[1] + row, column)[: len(part.shape)]
    shape, local = rule.shape(rule.whole), part.shape
    if layer is not None:
        offsets, shape, local = (layer, *offsets), (num_layers, *shape), (1, *local)
    spec = ChunkSpec(shape, offsets, TensorSpec(local, dtype))
    return megatron.torch_dist_key(rule.megatron), spec


def rule_of(piece: TensorSlice, rules: Mapping[str, Rule]) -> tuple[Rule, int | None]:
    """The rule of a piece's tensor, and its layer's number if it has one."""
    if piece.tensor in rules:
        return rules[piece.tensor], None
    *_, layer, rest = piece.tensor.split(".", 3)
    return rules[f"decoder.layers.{{}}.{rest}"], int(layer)


def is_one_range(rule: Rule) -> bool:
    """Whether several blocks of a rule's view are one range of the whole tensor's rows.

    Gate and up are not: each rank has rows of both.
    """
    return rule.shard_axis in (None, BY_BLOCKS) or rule.view[0] == 1


def _one_range_each(piece: TensorSlice, rules: Mapping[str, Rule]) -> list[TensorSlice]:
    """Cuts a piece so that each part is one range of the whole tensor's rows: gate, then up."""
    # A torch_dist chunk is one box of the global tensor. A rank's linear_fc1 is two of them: stored
    # as one chunk, its up rows would be loaded as the gate rows that follow its own.
    rule, layer = rule_of(piece, rules)
    (b0, b1), rows, columns = piece.box
    if is_one_range(rule):
        return [piece]
    return [rule.piece(((b, b + 1), rows, columns), layer) for b in range(b0, b1)]
