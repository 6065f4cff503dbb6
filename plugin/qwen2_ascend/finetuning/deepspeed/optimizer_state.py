"""The ZeRO optimizer's state by parameter and whole, however it is divided over ranks.

Kinds are those of `training.optimizer`: exp_avg, exp_avg_sq, and fp32_param where the weights are
of a smaller dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qwen2_ascend.checkpoint.formats.megatron_optimizer import MAIN, MOMENTS
from qwen2_ascend.checkpoint.transformers_model import shape_of
from qwen2_ascend.finetuning.deepspeed.engine import ZeroRun


@torch.no_grad()
def gather_state(
    run: ZeroRun, parameters: Mapping[str, torch.nn.Parameter]
) -> Iterator[tuple[str, str, Tensor]]:
    """Yields (kind, name, values in fp32 on the host); every rank exhausts it together."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    has_moments = any(run.optimizer.optimizer.state.values())
    for name, parameter in parameters.items():
        for kind in MOMENTS:
            # before the first update there is nothing yet
            whole = safe_get_full_optimizer_state(parameter, kind) if has_moments else None
            yield kind, name, torch.zeros(shape_of(parameter)) if whole is None else whole.cpu()
        if parameter.dtype != torch.float32:
            main = safe_get_full_fp32_param(parameter)
            assert main is not None
            yield MAIN, name, main.cpu()


@torch.no_grad()
def load_state(
    run: ZeroRun,
    parameters: Mapping[str, torch.nn.Parameter],
    states: Mapping[str, Mapping[str, Tensor]],
    num_updates: int,
) -> None:
    """Puts back what `gather_state` gave, at any stage and number of ranks.

    Args:
        run: as yet without a step.
        parameters: by name.
        states: of every kind the values by name.
        num_updates: that had been made.
    """
    _seed_adam(run, num_updates)
    for kind, values in states.items():
        key = None if kind == MAIN else kind
        for name, parameter in parameters.items():
            _set(run, parameter, values[name].to(run.runtime.device, torch.float32), key)


def num_updates(run: ZeroRun) -> int:
    """Updates that Adam has made, which its bias correction goes by."""
    return next((int(state["step"]) for state in run.optimizer.optimizer.state.values()), 0)


def _seed_adam(run: ZeroRun, num_updates: int) -> None:
    """The state that Adam makes at its first update, with zero moments."""
    zero, adam = run.optimizer, run.optimizer.optimizer
    if run.stage == 3:
        masters = zero.fp32_partitioned_groups_flat
    else:
        masters = zero.single_partition_of_fp32_groups
    counts_on_host = not isinstance(adam, torch.optim.AdamW)
    for master in masters:
        step = num_updates if counts_on_host else torch.tensor(float(num_updates))
        adam.state[master] = {"step": step} | {kind: torch.zeros_like(master) for kind in MOMENTS}
    if run.stage < 3:
        zero._lazy_init_hp_params_optimizer_state()


def _set(run: ZeroRun, parameter: torch.nn.Parameter, values: Tensor, kind: str | None) -> None:
    """This rank's part of one parameter's moments, or of its fp32 values."""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    if run.stage < 3:
        if kind is None:
            safe_set_full_fp32_param(parameter, values)
        else:
            safe_set_full_optimizer_state(parameter, values, kind)
        return
    own = _part(parameter, values, run.runtime.rank)
    if kind is None:
        safe_set_local_fp32_param(parameter, own)
    else:
        safe_set_local_optimizer_state(parameter, own, kind)


def _part(parameter: Any, values: Tensor, rank: int) -> Tensor:
    """What ZeRO-3 keeps on a rank: an equal part of the values, the last one padded by zeros."""
    size = parameter.ds_tensor.numel()
    own = values.flatten()[rank * size : (rank + 1) * size]
    return torch.nn.functional.pad(own, (0, size - own.numel()))
