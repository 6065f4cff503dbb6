"""The optimizer's state of whole parameters, put together from all ranks' slices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def gather_state(optimizer: Any, chunks: Sequence[Any]) -> Iterator[tuple[int, str, dict]]:
    """Yields (chunk, parameter name, tensors by kind, fp32 and of the parameter's shape).

    All ranks of a data-parallel group must exhaust it together; each gets the same.
    """
    import torch
    from megatron.core import parallel_state

    from qwen2_ascend.training.optimizer import is_distributed, kinds_of, state_slices

    states = state_slices(optimizer)
    for index, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            if not parameter.requires_grad:
                continue
            own, whole = states.get(parameter), {}
            for kind in kinds_of(parameter):
                whole[kind] = torch.zeros(parameter.numel(), device=parameter.device)
                if own is not None:
                    whole[kind][own.start : own.stop] = own.tensors[kind].reshape(-1)
                if is_distributed(optimizer):
                    group = parallel_state.get_data_parallel_group()
                    torch.distributed.all_reduce(whole[kind], group=group)
                whole[kind] = whole[kind].reshape(parameter.shape).cpu()
            yield index, name, whole
