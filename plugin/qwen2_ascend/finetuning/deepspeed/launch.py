"""Fine-tuning by DeepSpeed ZeRO before the start, as `training.launch` says."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from qwen2_ascend.errors import UserError
from qwen2_ascend.finetuning.deepspeed.saved import find_saved_zero
from qwen2_ascend.finetuning.deepspeed.settings import ZeroFinetuneSettings, validate
from qwen2_ascend.finetuning.launch import check_data
from qwen2_ascend.finetuning.plan import plan_of_run, with_exports
from qwen2_ascend.training.launch import launch
from qwen2_ascend.training.plan import (
    Found,
    RunPlan,
    folder_of,
    require_same_positions,
    within,
)
from qwen2_ascend.training.saved_run import SavedRun

if TYPE_CHECKING:
    from qwen2_ascend.runtime import Runtime


def finetune(settings: ZeroFinetuneSettings) -> None:
    """Tunes as `settings` say, as one rank of torchrun's or as a process alone.

    Raises:
        UserError: settings, data or checkpoint are not as they have to be.
        NonFiniteError: the loss or the gradient norm is not finite, and that is to end the run.
    """
    launch(settings, make_plan, validate, check_data, _tune)


def make_plan(
    settings: ZeroFinetuneSettings, found: Found | None = None
) -> RunPlan[ZeroFinetuneSettings]:
    """Opens what --load names; reads headers only.

    The arguments are those of `training.plan.make_plan`.

    Raises:
        UserError: nothing usable is there, it contradicts the flags, or the run's end could not
            be written.
    """
    load = settings.model.load
    saved = find_saved_zero(load and folder_of("load", load, found))
    if load is None or saved is None:
        plan = plan_of_run(settings, found)
    else:
        if settings.lora.is_on and not settings.model.finetune:
            raise UserError(
                f"--load {load}: holds a run that tunes all weights; --finetune takes its weights "
                "alone, to put adapters on them."
            )
        model = replace(settings.model, load=saved.folder, finetune=True)
        told = found and found._replace(folders={**found.folders, "load": "."})
        plan = plan_of_run(replace(settings, model=model), told)
        folders = {**plan.found.folders, "load": within(load, saved.folder)}
        plan = replace(plan, found=plan.found._replace(folders=folders))
        if not settings.model.finetune:
            assert plan.source is not None
            require_same_positions(load, plan.config, plan.source)
            plan = replace(plan, saved=saved)
    if isinstance(plan.saved, SavedRun):
        raise UserError(
            f"--load {load}: holds a run of megatron-core's, which launch/finetune_qwen2.py "
            "resumes; --finetune takes its weights alone."
        )
    return with_exports(plan) if found is None else plan


def _tune(plan: RunPlan[ZeroFinetuneSettings], runtime: Runtime) -> None:
    # megatron-core, after the start
    from qwen2_ascend.finetuning.deepspeed.finetune import tune

    tune(plan, runtime)
