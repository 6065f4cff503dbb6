"""Whole tensors in transformers' names and shapes, made on rank 0 from every rank's pieces.

Activations are joined over the tensor-parallel ranks, and over those that share each sequence, and
cut apart as the mapping table cuts the weights that made them; gradients go back through the table
itself (`checkpoint/rules.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state

from qwen2_ascend.alignment.capture import COLUMNS, GATE_UP, GROUPS, QKV, SEQUENCE, Taken
from qwen2_ascend.alignment.sublayers import LOGITS, LOSS
from qwen2_ascend.checkpoint.rules import (
    Shard,
    TensorSlice,
    hugging_face_pieces,
    megatron_pieces,
    qwen2_rules,
)
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.model.sequence_cut import SequenceCut, is_first_part
from qwen2_ascend.parallel import ParallelLayout

if TYPE_CHECKING:
    from qwen2_ascend.runtime import Runtime

_CUT = (COLUMNS, QKV, GROUPS, GATE_UP)


def gather_activations(
    taken: Mapping[str, Taken],
    config: Qwen2Config,
    runtime: Runtime,
    *,
    sequence_parallel: bool,
    sequence_cut: SequenceCut | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Whole activations `[n * b, s, features]` on rank 0's host; nothing on the others.

    Of what the tensor-parallel ranks should all hold alike the first one's are taken, and by how
    much the others' differ is told, relative to each token, where they do. Every rank calls it.

    Args:
        taken: this rank's pieces, from `capture.joined`.
        config: the model.
        runtime: the started one.
        sequence_parallel: whether tensor-parallel ranks share the sequence.
        sequence_cut: which part of every sequence this rank has; None is all of it.
    """
    is_first = parallel_state.get_tensor_model_parallel_rank() == 0
    own: dict[str, torch.Tensor] = {}
    disagreement: dict[str, float] = {}
    for name, (tensor, sharing) in taken.items():
        pieces = _from_tensor_parallel_ranks(tensor)
        if sharing not in _CUT and not (sharing == SEQUENCE and sequence_parallel):
            if differ := max(_difference(pieces[0], piece) for piece in pieces):
                disagreement[name] = differ
            pieces = pieces[:1]
        if is_first:
            parts = _whole(name, pieces, sharing, config)
            own |= {key: whole_sequences(key, part, sequence_cut) for key, part in parts.items()}
    if sequence_cut is not None and sequence_cut.rank:
        own = {}
    everyones: list[Any] = [None] * runtime.world_size
    torch.distributed.all_gather_object(everyones, disagreement)
    return collect(own, runtime), {name: x for found in everyones for name, x in found.items()}


def whole_sequences(name: str, own: torch.Tensor, sequence_cut: SequenceCut | None) -> torch.Tensor:
    """A tensor of all positions, in their order, from those of the ranks that share them.

    Args:
        name: the tensor's name; the losses' last axis, of `[n * b, 1, s]`, is the sequence.
        own: this rank's part, else `[n * b, s, features]`.
        sequence_cut: None where this rank has all positions.
    """
    if sequence_cut is None:
        return own
    parts = [torch.empty_like(own) for _ in range(sequence_cut.size)]
    torch.distributed.all_gather(parts, own.contiguous(), group=sequence_cut.group)
    return sequence_cut.whole(parts, 2 if name == LOSS else 1)


def _difference(ours: torch.Tensor, other: torch.Tensor) -> float:
    """The largest relative difference of a token."""
    if torch.equal(ours, other):
        return 0.0
    a, b = ours.float(), other.float()
    relative = ((a - b).norm(dim=-1) / a.norm(dim=-1)).max().item()
    return relative if math.isfinite(relative) else math.inf


def _from_tensor_parallel_ranks(tensor: torch.Tensor) -> list[torch.Tensor]:
    group: Any = parallel_state.get_tensor_model_parallel_group()
    pieces = [torch.empty_like(tensor) for _ in range(group.size())]
    torch.distributed.all_gather(pieces, tensor.contiguous(), group=group)
    return pieces


def _whole(
    name: str, pieces: list[torch.Tensor], sharing: str, config: Qwen2Config
) -> dict[str, torch.Tensor]:
    """One or several of the model's tensors, `[b, s, features]`, from all ranks' `[s, b, ...]`."""
    if sharing == GROUPS:  # more ranks than groups: neighbours hold the same one
        pieces = pieces[:: max(len(pieces) // config.num_query_groups, 1)]
    whole = torch.cat(pieces, dim=-1 if sharing in _CUT else 0)
    place = name.rpartition(".")[0]
    if sharing == QKV:
        cut = _query_key_value(whole, config)
        parts = {f"{place}.{kind}": tensor for kind, tensor in cut.items()}
    elif sharing == GATE_UP:
        gate, up = whole.unflatten(-1, (len(pieces), 2, -1)).unbind(-2)
        parts = {f"{place}.gate": gate.flatten(-2), f"{place}.up": up.flatten(-2)}
    else:
        parts = {name: whole[..., : config.vocab_size] if name == LOGITS else whole}  # no padding
    return {key: tensor.transpose(0, 1).contiguous() for key, tensor in parts.items()}


def _query_key_value(qkv: torch.Tensor, config: Qwen2Config) -> dict[str, torch.Tensor]:
    """Query, key and value by the table's rule of linear_qkv; a block is one query group."""
    rule = next(rule for rule in qwen2_rules(config) if rule.megatron.endswith("linear_qkv.bias"))
    blocks = qkv.unflatten(-1, rule.view[:2])
    return {
        kind: blocks[..., slice(*box[1])].flatten(-2)
        for kind, (_, box) in zip(("query", "key", "value"), rule.parts, strict=True)
    }


def gather_gradients(
    chunks: Sequence[Any],
    config: Qwen2Config,
    layout: ParallelLayout,
    padded_vocab_size: int,
    runtime: Runtime,
) -> dict[str, torch.Tensor]:
    """Every parameter's gradient under its Hugging Face name on rank 0's host; nothing elsewhere.

    Every rank calls it.

    Args:
        chunks: this rank's chunks in megatron-core's DistributedDataParallel, after a backward
            whose gradients are final.
        config: the model.
        layout: its cut.
        padded_vocab_size: rows of the embedding over all ranks.
        runtime: the started one.
    """
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    own = {
        f"{tp_rank} {stage} {index} {name}": parameter.main_grad
        for index, chunk in enumerate(chunks)
        for name, parameter in chunk.module.named_parameters()
        if is_first_part()
    }
    pieces = megatron_pieces(config, layout, padded_vocab_size)
    views: dict[str, torch.Tensor] = {}
    rules = {rule.megatron: rule for rule in qwen2_rules(config, padded_vocab_size)}

    def keep(key: str, tensor: torch.Tensor) -> None:
        *place, name = key.split(" ")
        piece = pieces[Shard(*map(int, place))][name]
        if piece.tensor not in views:
            views[piece.tensor] = torch.zeros(rules[_rule_name(piece)].view, dtype=tensor.dtype)
        part = views[piece.tensor][tuple(slice(*edge) for edge in piece.box)]
        part.copy_(tensor.view(part.shape))

    collect(own, runtime, keep)
    if runtime.rank != 0:
        return {}
    return {
        name: views[piece.tensor][tuple(slice(*edge) for edge in piece.box)].reshape(piece.shape)
        for name, piece in hugging_face_pieces(config).items()
    }


def _rule_name(piece: TensorSlice) -> str:
    return ".".join("{}" if word.isdigit() else word for word in piece.tensor.split("."))


def collect(
    own: Mapping[str, torch.Tensor],
    runtime: Runtime,
    keep: Callable[[str, torch.Tensor], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Brings every rank's tensors to rank 0's host, one at a time; every rank calls it.

    Args:
        own: this rank's; names are unique over the ranks.
        runtime: the started one.
        keep: called on rank 0 with each; without it they are returned.

    Returns:
        All of them on rank 0, nothing on the others or with `keep`.
    """
    kept: dict[str, torch.Tensor] = {}
    keep = keep or kept.__setitem__
    headers: list[Any] = [None] * runtime.world_size
    shapes = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in own.items()]
    torch.distributed.all_gather_object(headers, shapes)
    for rank, tensors in enumerate(headers):
        for name, shape, dtype in tensors:
            if rank == runtime.rank:
                tensor = own[name].detach().contiguous()
                if rank == 0:
                    keep(name, tensor.cpu())
                else:
                    torch.distributed.send(tensor, 0)
            elif runtime.rank == 0:
                received = torch.empty(shape, dtype=dtype, device=runtime.device)
                torch.distributed.recv(received, rank)
                keep(name, received.cpu())
    return kept
