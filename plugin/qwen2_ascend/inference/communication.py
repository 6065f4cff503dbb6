"""What the ranks of one model tell each other while it generates.

Stages pass hidden states on; the tensor parallel ranks of the last stage have a part of the
vocabulary each; the tokens chosen there go to every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, distributed


def from_previous_stage(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """The hidden states that the stage before this one has sent."""
    received = torch.empty(*shape, dtype=dtype, device=device)
    previous = parallel_state.get_pipeline_model_parallel_prev_rank()
    distributed.recv(received, previous, group=_pipeline())
    return received


def to_next_stage(hidden: Tensor) -> None:
    """Sends hidden states to the stage after this one."""
    following = parallel_state.get_pipeline_model_parallel_next_rank()
    distributed.send(hidden.contiguous(), following, group=_pipeline())


def from_last_stage(tokens: list[int] | None, count: int, device: torch.device) -> list[int]:
    """`tokens` of the last stage's first tensor parallel rank, on every rank of the model."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    pp = parallel_state.get_pipeline_model_parallel_world_size()
    if tp == pp == 1:
        assert tokens is not None
        return tokens
    shared = torch.zeros(count, dtype=torch.int64, device=device)
    if tokens is not None:
        shared.copy_(torch.tensor(tokens))
    if tp > 1 and parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        source = parallel_state.get_tensor_model_parallel_src_rank()
        distributed.broadcast(shared, source, group=_tensor())
    if pp > 1:
        source = parallel_state.get_pipeline_model_parallel_last_rank()
        distributed.broadcast(shared, source, group=_pipeline())
    return shared.tolist()


def best_over_ranks(values: Tensor, indices: Tensor, first_column: int) -> Tensor:
    """The column of the largest value over all tensor parallel ranks; the first where two tie.

    Args:
        values: each row's largest on this rank, `[n]`, fp32.
        indices: its column among this rank's, `[n]`.
        first_column: where this rank's columns begin in the whole.
    """
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return indices
    # fp32 holds every whole number below 2^24, which no vocabulary comes near.
    pairs = torch.stack((values, (indices + first_column).float()))
    gathered = torch.stack(_gathered(pairs))
    best = gathered[:, 0].argmax(dim=0, keepdim=True)
    return gathered[:, 1].gather(0, best).squeeze(0).long()


def joined_columns(part: Tensor, num_columns: int) -> Tensor:
    """`[n, num_columns]` from the columns that each tensor parallel rank has, in their order."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    if tp == 1:
        return part
    width = -(-num_columns // tp)
    padded = torch.nn.functional.pad(part, (0, width - part.shape[-1]))
    return torch.cat(_gathered(padded.contiguous()), dim=-1)[..., :num_columns]


def largest_over_ranks(values: Tensor) -> Tensor:
    """Each number's largest over the tensor parallel ranks."""
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        distributed.all_reduce(values, distributed.ReduceOp.MAX, group=_tensor())
    return values


def summed_over_ranks(values: Tensor) -> Tensor:
    """Each number's sum over the tensor parallel ranks."""
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        distributed.all_reduce(values, group=_tensor())
    return values


def shared_by_last_stage(
    values: Tensor | None, shape: Sequence[int], device: torch.device
) -> Tensor:
    """fp32 numbers that the ranks of the last stage have, on every rank."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        assert values is not None
        return values
    shared = torch.empty(*shape, device=device) if values is None else values.contiguous()
    source = parallel_state.get_pipeline_model_parallel_last_rank()
    distributed.broadcast(shared, source, group=_pipeline())
    return shared


def _gathered(part: Tensor) -> list[Tensor]:
    tp = parallel_state.get_tensor_model_parallel_world_size()
    parts = [torch.empty_like(part) for _ in range(tp)]
    distributed.all_gather(parts, part, group=_tensor())
    return parts


def _pipeline() -> Any:
    return parallel_state.get_pipeline_model_parallel_group()


def _tensor() -> Any:
    return parallel_state.get_tensor_model_parallel_group()
