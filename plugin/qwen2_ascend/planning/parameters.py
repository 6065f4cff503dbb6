"""Numbers of weights, of the model and of each rank: sizes of checkpoint/rules.py's views."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import lcm, prod
from typing import NamedTuple

from qwen2_ascend.checkpoint.adapter_rules import adapter_rules
from qwen2_ascend.checkpoint.rules import qwen2_rules
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.lora_config import LoraConfig
from qwen2_ascend.planning.job import RunLayout


class Parameters(NamedTuple):
    """Numbers of weights on one rank."""

    all: int
    """The weights that are held and computed with."""
    trained: int
    """The weights that get a gradient: all, or the adapters."""
    buffers: tuple[int, ...]
    """Elements of each model chunk's gradient buffer, with the distributed optimizer's padding."""
    largest: int
    """Elements of the largest trained tensor."""


def parameters(cut: RunLayout, stage: int) -> Parameters:
    """Weights of a rank of `stage`, by its model chunks; computed once for all cuts alike."""
    key = (
        cut.job.config,
        cut.job.lora_rank,
        (cut.tp, cut.pp, cut.layers_per_chunk, cut.num_layer_list, cut.noop_layers),
        cut.replicas if cut.distributed_optimizer else None,
        stage,
    )
    if key not in _KNOWN:
        if len(_KNOWN) > 100_000:
            _KNOWN.clear()
        _KNOWN[key] = _parameters(cut, stage)
    return _KNOWN[key]


_KNOWN: dict[tuple, Parameters] = {}


def _parameters(cut: RunLayout, stage: int) -> Parameters:
    chunks = [_chunk_tensors(cut, stage, chunk) for chunk in range(cut.num_chunks)]
    frozen = 0
    if cut.job.lora_rank is not None:
        frozen = sum(map(sum, chunks))
        adapters = _layer_tensors(cut.job.config, cut.tp, cut.job.lora_rank)
        chunks = [layers * adapters for layers in cut.chunk_layers(stage)]
    trained = sum(map(sum, chunks))
    shared = cut.job.config.tie_word_embeddings and cut.pp > 1 and cut.job.lora_rank is None
    buffers = tuple(_buffer(cut, tensors, shared) for tensors in chunks)
    largest = max(max(tensors, default=0) for tensors in chunks)
    return Parameters(frozen + trained, trained, buffers, largest)


def num_parameters(config: Qwen2Config) -> int:
    """Weights and biases of the unpadded model; a tied embedding counts once."""
    rules = qwen2_rules(config)
    return sum(prod(r.view) * (config.num_layers if r.is_of_layer else 1) for r in rules)


def layer_tensors(cut: RunLayout) -> tuple[int, ...]:
    """Elements of each weight of a layer on one rank, in the order of the rules."""
    return _layer_tensors(cut.job.config, cut.tp, None)


@cache
def _layer_tensors(config: Qwen2Config, tp: int, lora_rank: int | None) -> tuple[int, ...]:
    """Elements of a layer's weights on one rank, or of its adapters on all projections."""
    rules = qwen2_rules(config)
    if lora_rank is not None:
        rules = adapter_rules(config, LoraConfig(rank=lora_rank))
    of_layer = (rule for rule in rules if rule.is_of_layer)
    return tuple(prod(r.view) // (1 if r.shard_axis is None else tp) for r in of_layer)


def embedding(cut: RunLayout) -> int:
    """Elements of a rank's rows of the embedding, or of the output layer."""
    return cut.padded_vocab_size // cut.tp * cut.job.config.hidden_size


def _chunk_tensors(cut: RunLayout, stage: int, chunk: int) -> list[int]:
    tensors = [*cut.chunk_layers(stage)[chunk] * layer_tensors(cut)]
    if (stage, chunk) == (0, 0):
        tensors = [embedding(cut), *tensors]
    if cut.is_last(stage) and chunk == cut.num_chunks - 1:
        tensors = [*tensors, cut.job.config.hidden_size]
        if cut.pp > 1 or not cut.job.config.tie_word_embeddings:
            tensors.append(embedding(cut))
    return tensors


def _buffer(cut: RunLayout, tensors: Sequence[int], shared_embedding: bool) -> int:
    """Elements of a contiguous buffer: the distributed optimizer aligns tensors and its end."""
    if not cut.distributed_optimizer:
        return sum(tensors)
    multiple = lcm(cut.replicas, 128)
    start = 0
    # megatron-core lays them out in reverse, and a shared embedding in a bucket of its own
    for size in reversed(tensors):
        alone = shared_embedding and size == embedding(cut)
        start = _up(start, 64)
        start = _up(start, multiple) if alone else start
        start += size
        start = _up(start, multiple) if alone else start
    return _up(start, multiple)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
