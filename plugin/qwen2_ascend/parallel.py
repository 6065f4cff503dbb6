"""ParallelLayout: which rank holds which layer. Pure arithmetic, checked before any work begins."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError, raise_if

ContextParallelAlgorithm = Literal["megatron_cp_algo", "ulysses_cp_algo", "kvallgather_cp_algo"]
"""How attention sees the parts of a sequence that other ranks hold: K and V travel round a ring;
heads are exchanged for positions; K and V are gathered."""


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """How a model is cut over tensor- and pipeline-parallel ranks, and sequences over others."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Interleaved pipeline (VPP): layers in each of a stage's chunks."""
    num_layer_list: tuple[int, ...] | None = None
    """Layers of each pipeline stage when they are not equal."""
    context_parallel_size: int = 1
    """Ranks that share each sequence. It cuts nothing that is stored."""
    context_parallel_algo: ContextParallelAlgorithm = "megatron_cp_algo"
    """How attention sees what other ranks hold of a sequence."""

    @property
    def tp(self) -> int:
        return self.tensor_model_parallel_size

    @property
    def pp(self) -> int:
        return self.pipeline_model_parallel_size

    @property
    def cp(self) -> int:
        return self.context_parallel_size

    @property
    def model_size(self) -> int:
        """Ranks that compute one copy of the model: they share layers or sequences."""
        return self.tp * self.pp * self.cp

    def world_fault(self, world_size: int) -> str:
        """Why so many processes do not do, where `model_size` does not divide their number."""
        sizes = {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            **({"context_parallel_size": self.cp} if self.cp > 1 else {}),
        }
        words = " times ".join(f"{name}={size}" for name, size in sizes.items())
        enough = -(-world_size // self.model_size) * self.model_size
        return (
            f"{world_size} process(es) cannot be shared out to {words}; start a multiple of "
            f"{self.model_size}, for example torchrun --nproc-per-node {enough}."
        )

    @property
    def of_weights(self) -> ParallelLayout:
        """The same without what cuts sequences: of what a checkpoint says."""
        return replace(self, context_parallel_size=1, context_parallel_algo="megatron_cp_algo")

    def virtual_pipeline_size(self, num_layers: int) -> int | None:
        """Chunks per stage, or None without an interleaved pipeline."""
        if self.num_layers_per_virtual_pipeline_stage is None:
            return None
        return num_layers // self.pp // self.num_layers_per_virtual_pipeline_stage

    def stages(self, num_layers: int) -> tuple[tuple[range, ...], ...]:
        """Global layer numbers as `[pp_stage][chunk]`; one chunk per stage without VPP.

        Chunk c of stage p holds layers (c * pp + p) * n ... + n - 1 with n layers per chunk.
        """
        if self.num_layer_list is not None:
            ends = list(accumulate(self.num_layer_list))
            return tuple(
                (range(end - n, end),) for n, end in zip(self.num_layer_list, ends, strict=True)
            )
        n = self.num_layers_per_virtual_pipeline_stage or num_layers // self.pp
        chunks = self.virtual_pipeline_size(num_layers) or 1
        return tuple(
            tuple(range((c * self.pp + p) * n, (c * self.pp + p + 1) * n) for c in range(chunks))
            for p in range(self.pp)
        )

    def check(self, config: Qwen2Config, padded_vocab_size: int | None = None) -> None:
        """Raises UserError naming everything about this layout that does not fit `config`."""
        vocabulary = config.vocab_size if padded_vocab_size is None else padded_vocab_size
        raise_if(
            self._size_faults()
            or self._tensor_faults(config)
            + self._layer_faults(config)
            + _vocabulary_faults(config.vocab_size, vocabulary, self.tp)
        )

    def _size_faults(self) -> list[str]:
        sizes = {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "context_parallel_size": self.cp,
            "num_layers_per_virtual_pipeline_stage": self.num_layers_per_virtual_pipeline_stage,
        }
        faults = [
            f"{k}={v} must be at least 1." for k, v in sizes.items() if v is not None and v < 1
        ]
        if self.num_layer_list is not None and min(self.num_layer_list, default=0) < 1:
            faults.append(f"num_layer_list={_comma(self.num_layer_list)}: each must be at least 1.")
        return faults

    def _tensor_faults(self, config: Qwen2Config) -> list[str]:
        tp = self.tp
        usable = tensor_parallel_sizes(config)
        faults = [
            f"tensor_model_parallel_size={tp} does not divide {name}={getattr(config, name)}; "
            f"use {_either(usable)}."
            for name in ("num_attention_heads", "hidden_size", "ffn_hidden_size")
            if getattr(config, name) % tp
        ]
        groups = config.num_query_groups
        if not faults and groups % tp and tp % groups:
            faults.append(
                f"tensor_model_parallel_size={tp} neither divides nor is a multiple of "
                f"num_query_groups={groups}; use {_either(usable)}."
            )
        elif not faults and _qkv_rows(config) % tp:
            faults.append(
                f"tensor_model_parallel_size={tp} does not divide the {_qkv_rows(config)} rows of "
                f"linear_qkv; use {_either(usable)}."
            )
        return faults

    def _layer_faults(self, config: Qwen2Config) -> list[str]:
        layers, pp = config.num_layers, self.pp
        per_chunk = self.num_layers_per_virtual_pipeline_stage
        if self.num_layer_list is not None:
            return self._layer_list_faults(layers)
        if layers % pp:
            return [
                f"pipeline_model_parallel_size={pp} does not divide num_layers={layers}; use "
                f"{_either(_divisors(layers))}, or say --num-layer-list with {pp} numbers that "
                f"sum to {layers}."
            ]
        if per_chunk is None:
            return []
        if pp == 1:
            return [
                f"num_layers_per_virtual_pipeline_stage={per_chunk} needs "
                "pipeline_model_parallel_size of at least 2."
            ]
        if layers // pp % per_chunk:
            return [
                f"num_layers_per_virtual_pipeline_stage={per_chunk} does not divide the "
                f"{layers // pp} layers of a stage; use {_either(_divisors(layers // pp))}."
            ]
        return []

    def _layer_list_faults(self, num_layers: int) -> list[str]:
        numbers = self.num_layer_list or ()
        faults = []
        if self.num_layers_per_virtual_pipeline_stage is not None:
            faults.append(
                "num_layer_list and num_layers_per_virtual_pipeline_stage exclude each other."
            )
        if len(numbers) != self.pp:
            faults.append(
                f"num_layer_list={_comma(numbers)} has {len(numbers)} numbers for "
                f"pipeline_model_parallel_size={self.pp}; give one per stage."
            )
        if (total := sum(numbers)) != num_layers:
            faults.append(
                f"num_layer_list={_comma(numbers)} sums to {total}, not num_layers={num_layers}."
            )
        return faults


def sequence_faults(
    layout: ParallelLayout, config: Qwen2Config, seq_length: int, *, sequence_parallel: bool
) -> list[str]:
    """Why sequences cannot be cut by `layout`, one sentence each; with what could be.

    Args:
        layout: otherwise right, for `config`.
        config: the model's.
        seq_length: tokens in a sequence.
        sequence_parallel: whether tensor-parallel ranks share what a context-parallel rank has.
    """
    tp, cp, algorithm = layout.tp, layout.cp, layout.context_parallel_algo
    if cp == 1:
        return []
    faults, unit = [], sequence_unit(layout, sequence_parallel=sequence_parallel)
    if seq_length % unit:
        near = sorted({max(seq_length // unit, 1) * unit, -(-seq_length // unit) * unit})
        faults.append(
            f"context_parallel_size={cp} with {algorithm} needs --seq-length to be a multiple of "
            f"{unit}, not {seq_length}; use {_either(tuple(near), most=None)}."
        )
    heads = config.num_attention_heads // tp
    if algorithm == "ulysses_cp_algo" and heads % cp:
        faults.append(
            f"context_parallel_size={cp} with {algorithm} cannot share out the {heads} query heads "
            f"of a tensor-parallel rank; use {_either(_divisors(heads))}, or megatron_cp_algo, "
            "which leaves heads where they are."
        )
    if algorithm != "ulysses_cp_algo" and config.attention_dropout:
        faults.append(
            f"context_parallel_size={cp} with {algorithm} cannot drop attention weights, and "
            f"config.json says attention_dropout={config.attention_dropout}; use "
            "--context-parallel-algo ulysses_cp_algo, or set attention_dropout to 0 there."
        )
    return faults


def sequence_unit(layout: ParallelLayout, *, sequence_parallel: bool) -> int:
    """What a sequence's length is a multiple of, in tokens."""
    chunks = 1 if layout.cp == 1 or layout.context_parallel_algo == "ulysses_cp_algo" else 2
    return math.lcm(chunks * layout.cp, layout.cp * layout.tp if sequence_parallel else 1)


def sequence_ranges(length: int, cp: int, rank: int, algorithm: str) -> tuple[range, ...]:
    """Which positions of every sequence a context-parallel rank holds, in its order.

    A causal query at the end of a sequence has more to do than one at its beginning. Where each
    rank attends with its own queries, it holds one chunk near each end: `rank` and
    `2 * cp - 1 - rank` of 2 * cp. With "ulysses_cp_algo" each attends with queries of all
    positions, and holds one piece.

    Args:
        length: tokens in a sequence, which the number of chunks divides.
        cp: context_parallel_size.
        rank: in the context-parallel group.
        algorithm: context_parallel_algo.
    """
    if cp == 1:
        return (range(length),)
    if algorithm == "ulysses_cp_algo":
        part = length // cp
        return (range(rank * part, (rank + 1) * part),)
    part = length // (2 * cp)
    return tuple(range(n * part, (n + 1) * part) for n in (rank, 2 * cp - 1 - rank))


def tensor_parallel_sizes(config: Qwen2Config) -> tuple[int, ...]:
    """Every tensor_model_parallel_size that can cut this model (its vocabulary aside)."""
    sizes = (config.num_attention_heads, config.hidden_size, config.ffn_hidden_size)
    sizes += (_qkv_rows(config),)
    groups = config.num_query_groups
    return tuple(n for n in _divisors(math.gcd(*sizes)) if not (groups % n and n % groups))


def _qkv_rows(config: Qwen2Config) -> int:
    """Rows of linear_qkv over all ranks; a query group may be cut over ranks, a row may not."""
    return (config.num_attention_heads + 2 * config.num_query_groups) * config.kv_channels


def padded_vocab_size(
    config: Qwen2Config, tp: int, *, size: int | None = None, divisible_by: int | None = None
) -> int:
    """Rows of the padded embedding over all tensor-parallel ranks.

    Args:
        config: the model.
        tp: tensor_model_parallel_size.
        size: the size itself (`--padded-vocab-size`).
        divisible_by: Megatron's rule, a multiple of `divisible_by * tp`
            (`--make-vocab-size-divisible-by`, 128 in Megatron).

    Without either the vocabulary keeps its size.

    Raises:
        UserError: the two contradict, or the size is too small or not divisible by `tp`.
    """
    if tp < 1:
        raise UserError(f"tensor_model_parallel_size={tp} must be at least 1.")
    if divisible_by is not None:
        if divisible_by < 1:
            raise UserError(f"--make-vocab-size-divisible-by {divisible_by} must be at least 1.")
        unit = divisible_by * tp
        if size is not None and size % unit:
            raise UserError(
                f"--padded-vocab-size {size} is no multiple of --make-vocab-size-divisible-by "
                f"{divisible_by} times tensor_model_parallel_size={tp}: give one of them."
            )
        size = size or -(-config.vocab_size // unit) * unit
    padded = config.vocab_size if size is None else size
    raise_if(_vocabulary_faults(config.vocab_size, padded, tp))
    return padded


def _vocabulary_faults(vocab_size: int, padded: int, tp: int) -> list[str]:
    if padded < vocab_size:
        return [f"padded_vocab_size={padded} is below vocab_size={vocab_size}; rows would be lost."]
    if padded % tp:
        return [
            f"tensor_model_parallel_size={tp} does not divide the vocabulary of {padded} rows; "
            f"pad it, for example --padded-vocab-size {-(-padded // tp) * tp} or "
            "--make-vocab-size-divisible-by 128 (Megatron's rule)."
        ]
    return []


def _divisors(n: int) -> tuple[int, ...]:
    """All of them below 2^32; of an absurdly large n those that are quickly found."""
    small = [d for d in range(1, min(math.isqrt(n), 2**16) + 1) if n % d == 0]
    return tuple(sorted({*small, *(n // d for d in small)}))


def _either(numbers: tuple[int, ...], most: int | None = 1024) -> str:
    words = [str(n) for n in numbers if most is None or n <= most]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _comma(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))
