"""torch_dist folders: chunks of tensors by key, with the layers stacked on an axis or apart."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

from qwen2_ascend.checkpoint.formats import megatron, megatron_optimizer, torch_dist
from qwen2_ascend.checkpoint.formats.stored import NUMPY_DTYPES, WEIGHT_DTYPES
from qwen2_ascend.checkpoint.plan import StoredSlice, volume
from qwen2_ascend.checkpoint.readers.base import Source, check_layer_count
from qwen2_ascend.checkpoint.readers.buckets import bucket_sources, run_held
from qwen2_ascend.checkpoint.rules import EMBEDDING, Rule, TensorSlice, qwen2_rules
from qwen2_ascend.checkpoint.slices import Run
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError, at_most, name_faults, raise_if


def read_torch_dist(folder: Path, config: Qwen2Config) -> Source:
    """Does what `read_hugging_face` does for an iteration of torch's distributed checkpointing."""
    chunks = torch_dist.read(folder, wanted=_is_model_key).chunks
    return _torch_dist_source(folder, config, chunks, str(folder))


def open_torch_dist_states(
    folder: Path,
    config: Qwen2Config,
    kinds: Mapping[str, str],
    *,
    args: Namespace,
    sharding_type: str | None,
) -> dict[str, Source]:
    """Does what `source.open_states` says for a torch_dist folder."""
    by_buckets = sharding_type in megatron_optimizer.BY_BUCKETS
    own_kinds = {kind: prefix for kind, prefix in kinds.items() if not (kind and by_buckets)}
    prefixes = tuple(own_kinds.values())
    chunks = torch_dist.read(folder, wanted=lambda key: key.startswith(prefixes)).chunks
    sources = {}
    for kind, prefix in own_kinds.items():
        own = {k.removeprefix(prefix): v for k, v in chunks.items() if k.startswith(prefix)}
        own = {key: parts for key, parts in own.items() if _is_model_key(key)}
        where = f"{folder}: {prefix}*"
        sources[kind] = _torch_dist_source(
            folder, config, own, where, prefix=prefix, padded=config.vocab_size
        )
    if by_buckets and sharding_type:
        others = [kind for kind in kinds if kind]
        sources |= bucket_sources(folder, config, others, args, sharding_type)
    return sources


def _torch_dist_source(
    folder: Path,
    config: Qwen2Config,
    chunks: Mapping[str, list[torch_dist.Chunk]],
    where: str,
    *,
    prefix: str = "",
    padded: int | None = None,
) -> Source:
    """The source of `chunks`, whose keys are weights'; in the folder they begin with `prefix`.

    `where` begins every fault; `padded` is the padded vocabulary, if it is known.
    """
    padded = padded or _vocabulary_rows(where, chunks, config)
    rules = {rule.megatron.replace(".{}", ""): rule for rule in qwen2_rules(config, padded)}
    held: list[StoredSlice] = []
    unexpected: list[str] = []
    faults: list[str] = []
    for key, parts in chunks.items():
        plain, layer = _unstack(key)
        if plain in rules:
            for part in parts:
                whole, run = _unflattened(rules[plain], layer, part, config)
                wrong = list(_chunk_faults(key, rules[plain], layer, whole, config))
                faults += wrong
                if not wrong:
                    found = _chunk_held(prefix + key, rules[plain], layer, whole)
                    if run is not None:
                        (one,) = found
                        found = run_held(one.name, one.piece, run, part.tensor)
                    held += found
        elif megatron.plain_name(key):
            unexpected.append(key)
    faults = name_faults("unexpected tensors", unexpected) + at_most(faults)
    raise_if(f"{where}: {fault}" for fault in faults)
    check_layer_count(where, config, len(held))
    faults += _coverage_faults(rules.values(), held, config)
    raise_if(f"{where}: {fault}" for fault in faults)
    return Source(
        kind="mg",
        folder=folder,
        config=config,
        held=tuple(held),
        format="torch_dist",
        padded_vocab_size=padded,
    )


def _vocabulary_rows(
    where: str, chunks: Mapping[str, list[torch_dist.Chunk]], config: Qwen2Config
) -> int:
    if EMBEDDING not in chunks or len(chunks[EMBEDDING][0].global_shape) != 2:
        raise UserError(f"{where}: no {EMBEDDING} in it; not a Qwen2 model.")
    padded = chunks[EMBEDDING][0].global_shape[0]
    if padded < config.vocab_size:
        raise UserError(
            f"{where}: {padded} vocabulary rows, fewer than vocab_size={config.vocab_size}."
        )
    return padded


def _is_model_key(key: str) -> bool:
    return not key.startswith("optimizer.")


def _unstack(key: str) -> tuple[str, int | None]:
    """A torch_dist key without its layer number, which homogeneous models stack on an axis."""
    key = megatron.plain_name(key) or key
    match = re.fullmatch(r"decoder\.layers\.(\d{1,9})\.(.+)", key)
    return (f"decoder.layers.{match[2]}", int(match[1])) if match else (key, None)


def _whole_shape(rule: Rule, layer: int | None, config: Qwen2Config) -> tuple[int, ...]:
    whole = rule.shape(rule.whole)
    return (config.num_layers, *whole) if rule.is_of_layer and layer is None else whole


def _unflattened(
    rule: Rule, layer: int | None, chunk: torch_dist.Chunk, config: Qwen2Config
) -> tuple[torch_dist.Chunk, Run | None]:
    """A run of a box's elements, as megatron-core before 0.15 keeps the distributed optimizer's.

    Of a tensor [X, Y] in boxes [x, y] it makes one [X / x, Y / y, x * y].

    Returns:
        The box, without its bytes, and the run; of any other chunk itself and None.
    """
    whole = _whole_shape(rule, layer, config)
    *counts, size = chunk.global_shape
    fits = len(counts) == len(whole) and all(
        n and total % n == 0 for n, total in zip(counts, whole, strict=True)
    )
    local = tuple(total // n for n, total in zip(counts, whole, strict=True)) if fits else ()
    if not fits or prod(local) != size:
        return chunk, None
    offsets = tuple(at * n for at, n in zip(chunk.offsets, local, strict=False))
    box = torch_dist.Chunk(whole, offsets, chunk.tensor._replace(shape=local))
    start = chunk.offsets[-1]
    return box, Run(start, start + prod(chunk.tensor.shape))


def _chunk_faults(
    key: str, rule: Rule, layer: int | None, chunk: torch_dist.Chunk, config: Qwen2Config
) -> Iterator[str]:
    """What of one chunk does not fit its rule."""
    whole = _whole_shape(rule, layer, config)
    if chunk.global_shape != whole:
        yield f"{key}: expected shape {whole}, found {chunk.global_shape}."
        return
    if chunk.tensor.dtype not in WEIGHT_DTYPES:
        yield f"{key}: dtype {chunk.tensor.dtype} is none of {', '.join(WEIGHT_DTYPES)}."
    ends = [o + n for o, n in zip(chunk.offsets, chunk.tensor.shape, strict=True)]
    if any(o < 0 or end > n for o, end, n in zip(chunk.offsets, ends, whole, strict=True)):
        yield f"{key}: a chunk of {chunk.tensor.shape} at {chunk.offsets} leaves {whole}."
        return
    rows_axis = -2 if rule.is_matrix else -1
    try:
        rule.rows_box(chunk.offsets[rows_axis], ends[rows_axis])
    except ValueError as error:
        yield f"{key}: {error}."


def _chunk_held(
    key: str, rule: Rule, layer: int | None, chunk: torch_dist.Chunk
) -> Iterator[StoredSlice]:
    """The held tensors of one chunk; more than one where it spans layers."""
    tensor, offsets = chunk.tensor, chunk.offsets
    first, count, shape = layer or 0, 1, tensor.shape
    if rule.is_of_layer and layer is None:
        first, count = offsets[0], shape[0]
        offsets, shape = offsets[1:], shape[1:]
    rows, columns = (*shape, 1)[:2]
    column = (offsets[1], offsets[1] + columns) if rule.is_matrix else (0, 1)
    size = rows * columns * NUMPY_DTYPES[tensor.dtype].itemsize
    box = (*rule.rows_box(offsets[0], offsets[0] + rows)[:2], column)
    for i in range(count):
        name = rule.megatron.format(first + i)
        stored = tensor._replace(offset=tensor.offset + i * size, shape=tuple(shape))
        start = (chunk.offsets[0] + i, *chunk.offsets[1:])
        in_file = f"{key}[{','.join(map(str, start))}]"
        yield StoredSlice(in_file, TensorSlice(name, box, tuple(shape)), stored)


def _coverage_faults(
    rules: Iterable[Rule], held: Iterable[StoredSlice], config: Qwen2Config
) -> Iterator[str]:
    """Tensors of which elements are missing, or stored twice."""
    found: dict[str, int] = {}
    for one in {(h.piece.tensor, h.piece.box) for h in held}:
        found[one[0]] = found.get(one[0], 0) + volume(one[1])
    missing = []
    for rule in rules:
        for layer in range(config.num_layers if rule.is_of_layer else 1):
            name = rule.megatron.format(layer)
            if found.pop(name, 0) != volume(rule.whole):
                missing.append(name)
    yield from name_faults("missing or incomplete tensors", missing)
    yield from name_faults("unexpected tensors", sorted(found))
