"""Megatron's mp_rank trees: a file for each rank, as .pt or as safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qwen2_ascend.checkpoint.formats import megatron, megatron_optimizer
from qwen2_ascend.checkpoint.formats.stored import StoredTensor
from qwen2_ascend.checkpoint.plan import StoredSlice
from qwen2_ascend.checkpoint.readers.base import Source, check_layer_count, layers, match
from qwen2_ascend.checkpoint.rules import EMBEDDING, OUTPUT, Shard, megatron_pieces
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.parallel import ParallelLayout


def read_rank_tree(folder: Path, config: Qwen2Config) -> Source:
    """Does what `read_hugging_face` does for an iteration whose ranks have a folder each."""
    return _ranks_source(folder, config, megatron.read_ranks(folder)[0])


def open_rank_states(
    folder: Path, config: Qwen2Config, kinds: Mapping[str, str]
) -> dict[str, Source]:
    """Does what `source.open_states` says for an mp_rank tree."""
    return {
        kind: _ranks_source(folder, config, shards, kind)
        for kind, shards in megatron_optimizer.read_rank_states(folder, kinds).items()
    }


def _ranks_source(
    folder: Path,
    config: Qwen2Config,
    shards: Mapping[Shard, Mapping[str, StoredTensor]],
    kind: str = "",
) -> Source:
    """The source of the ranks' weights, or of the optimizer's tensors of a kind."""
    check_layer_count(folder, config, sum(map(len, shards.values())))
    layout = layout_of(folder, shards, config)
    padded = _padded_vocab_size(folder, shards, layout, config)
    layout.check(config, padded)
    held: list[StoredSlice] = []
    faults: list[str] = []
    for shard, pieces in megatron_pieces(config, layout, padded).items():
        where = megatron.rank_folder_name(shard.tp_rank, shard.pp_stage, layout.pp)
        found, wrong = match(pieces, shards.get(shard, {}))
        held += (one._replace(name=_name_in_file(one, shard, layout, kind)) for one in found)
        faults += [f"{folder / where}: {fault}" for fault in wrong]
    if faults and any(OUTPUT in fault for fault in faults):
        tied = str(config.tie_word_embeddings).lower()
        faults.append(f'{folder}: config.json says "tie_word_embeddings": {tied}; is that right?')
    raise_if(faults)
    return Source(
        kind="mg",
        folder=folder,
        config=config,
        held=tuple(held),
        format="safetensors" if held[0].stored.path.suffix == ".safetensors" else "megatron",
        layout=layout,
        padded_vocab_size=padded,
    )


def _name_in_file(held: StoredSlice, shard: Shard, layout: ParallelLayout, kind: str) -> str:
    """A .pt holds several models of an interleaved pipeline, whose tensors have the same names."""
    has_chunks = layout.num_layers_per_virtual_pipeline_stage is not None
    model = f"model{shard.chunk}" if has_chunks else "model"
    if kind:
        return f"{megatron_optimizer.KEY}/{model}/{held.name}/{kind}"
    is_pt = held.stored.path.name == megatron.PT_FILE
    return f"{model}/{held.name}" if has_chunks and is_pt else held.name


def layout_of(
    folder: Path, shards: Mapping[Shard, Mapping[str, StoredTensor]], config: Qwen2Config
) -> ParallelLayout:
    """The layout that the ranks' files show; stages are counted on tensor-parallel rank 0."""
    tp = 1 + max(shard.tp_rank for shard in shards)
    pp = 1 + max(shard.pp_stage for shard in shards)
    counts = {s[1:]: len(layers(t)) for s, t in sorted(shards.items()) if s.tp_rank == 0}
    total = sum(counts.values())
    if total != config.num_layers:
        raise UserError(
            f"{folder}: the shards hold {total} layers, config.json says {config.num_layers}."
        )
    per_chunk = set(counts.values())
    is_interleaved = max(chunk for _, chunk in counts) > 0
    if is_interleaved and len(per_chunk) > 1:
        raise UserError(f"{folder}: virtual stages of unequal length are not implemented.")
    return ParallelLayout(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        num_layers_per_virtual_pipeline_stage=min(per_chunk) if is_interleaved else None,
        num_layer_list=None if len(per_chunk) == 1 else tuple(counts.values()),
    )


def _padded_vocab_size(
    folder: Path,
    shards: Mapping[Shard, Mapping[str, StoredTensor]],
    layout: ParallelLayout,
    config: Qwen2Config,
) -> int:
    embedding = shards.get(Shard(0, 0, 0), {}).get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{folder}: the first stage has no {EMBEDDING} of two axes.")
    padded = embedding.shape[0] * layout.tp
    if padded < config.vocab_size:
        raise UserError(
            f"{folder}: {layout.tp} x {embedding.shape[0]} vocabulary rows, fewer than "
            f"config.json's vocab_size={config.vocab_size}."
        )
    return padded
