"""The learning rate over the run: megatron-core's scheduler, counted in samples as in Megatron."""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from qwen2_ascend.runtime.megatron_compat import check_wsd_decay_style
from qwen2_ascend.training.length import RunLength
from qwen2_ascend.training.optimizer_settings import OptimizerSettings


def build_schedule(
    optimizer: Any, settings: OptimizerSettings, length: RunLength
) -> OptimizerParamScheduler:
    """The scheduler that sets `lr` and `weight_decay` of every parameter group.

    Args:
        optimizer: the optimizer whose `param_groups` it sets.
        settings: what `settings.validate` has checked.
        length: the length of the run; `step(increment=length.global_batch_size)` after each step.

    Raises:
        UserError: the installed megatron-core does not have `lr_wsd_decay_style`.
    """
    if settings.lr_decay_style == "WSD":
        check_wsd_decay_style(settings.lr_wsd_decay_style)
    decay_iters = max(1, settings.lr_decay_iters or length.train_iters)
    decay_samples = max(1, length.samples_at(decay_iters))
    if settings.lr_warmup_fraction is not None:
        warmup_samples = int(settings.lr_warmup_fraction * decay_samples)
    else:
        warmup_samples = min(length.samples_at(settings.lr_warmup_iters), decay_samples - 1)
    last_samples = None
    if (last_iters := settings.lr_wsd_decay_iters) is not None:
        last_samples = decay_samples - length.samples_at(max(decay_iters - last_iters, 0))
    return OptimizerParamScheduler(
        optimizer,
        init_lr=settings.lr_warmup_init,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=warmup_samples,
        lr_decay_steps=decay_samples,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=length.samples_at(max(1, length.train_iters)),
        wd_incr_style="constant",
        # a resumed run follows its command line; `changed` says what that changes
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=last_samples,
        lr_wsd_decay_style=settings.lr_wsd_decay_style,
    )


def current_lr(schedule: OptimizerParamScheduler) -> float:
    """The learning rate of the step to come."""
    return schedule.get_lr({})


_UNSAID = ("num_steps", "end_wd", "wd_incr_steps", "wd_incr_style")
"""Where the run is, and what weight decay that never changes has no use for."""


def changed(schedule: OptimizerParamScheduler, saved: dict[str, Any]) -> list[str]:
    """What `schedule` does otherwise than the one whose state `saved` is, in words."""
    now = schedule.state_dict()
    return [
        f"{name} {saved[name]} -> {value}"
        for name, value in now.items()
        if name not in _UNSAID and name in saved and saved[name] != value
    ]
