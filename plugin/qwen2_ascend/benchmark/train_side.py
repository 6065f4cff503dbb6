"""One side of the training benchmark: builds a model, and makes some steps for each question."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from qwen2_ascend.benchmark.device import measured, refuse_simulated, started_runtime
from qwen2_ascend.benchmark.work import SEED, Trainer, Work
from qwen2_ascend.training import settings as s
from qwen2_ascend.training.fusion import FusionSettings
from qwen2_ascend.training.optimizer_settings import OptimizerSettings, PrecisionSettings
from qwen2_ascend.training.plan import RunPlan, make_plan
from qwen2_ascend.training.start import start_runtime


def prepare(argument: str) -> Callable[[int], dict[str, Any]]:
    """What answers a number of steps, of a `Work` in JSON."""
    trainer = trainer_of(Work(**json.loads(argument)))
    refuse_simulated(trainer.runtime)
    return partial(_measured, trainer)


def _measured(trainer: Trainer, num_steps: int) -> dict[str, Any]:
    losses, figures = measured(trainer.runtime, lambda: [trainer.step() for _ in range(num_steps)])
    return {**figures, "losses": losses}


def trainer_of(work: Work) -> Trainer:
    """A side's model and optimizer. What needs megatron-core comes when the runtime has started."""
    if work.side == "transformers":
        from qwen2_ascend.benchmark.transformers_side import trainer

        return trainer(work, started_runtime(work.device))
    if work.side == "megatron-core":
        runtime = started_runtime(work.device, for_megatron=True)
        from qwen2_ascend.benchmark.megatron_side import trainer

        return trainer(work, runtime)
    plan = own_plan(work, plain=work.side == "ours-plain")
    runtime = start_runtime(plan)
    from qwen2_ascend.benchmark.own_side import trainer

    return trainer(plan, runtime)


def own_plan(work: Work, *, plain: bool = False) -> RunPlan:
    """The plan of the run that `launch/pretrain_qwen2.py` makes, `plain` without fused kernels."""
    fusion = FusionSettings()
    if plain:
        fused = ("rmsnorm", "rotary_pos_emb", "swiglu", "adamw")
        off = {f"no_fused_{name}": True for name in fused}
        fusion = FusionSettings(attention_backend="unfused", **off)
    settings = s.PretrainSettings(
        model=s.ModelSettings(load=Path(work.folder)),
        parallel=s.ParallelSettings(use_distributed_optimizer=work.use_distributed_optimizer),
        batch=s.BatchSettings(
            micro_batch_size=work.micro_batch_size,
            global_batch_size=work.global_batch_size,
            seq_length=work.seq_length,
            train_iters=work.max_steps,
        ),
        optimizer=OptimizerSettings(
            lr=work.lr,
            lr_decay_style="constant",
            clip_grad=work.clip_grad,
            weight_decay=work.weight_decay,
        ),
        precision=PrecisionSettings(bf16=work.dtype == "bf16"),
        fusion=fusion,
        data=s.DataSettings(mock_data=True),
        runtime=s.RuntimeSettings(device=work.device, seed=SEED),  # pyright: ignore
    )
    return make_plan(settings)
