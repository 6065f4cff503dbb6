"""What `launch/finetune_qwen2_deepspeed.py` runs, from the command line to the exit status."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from qwen2_ascend.errors import UserError
from qwen2_ascend.finetuning import finetune as megatron_path
from qwen2_ascend.finetuning.deepspeed.saved import SavedZero, find_saved_zero
from qwen2_ascend.finetuning.deepspeed.settings import ZeroFinetuneSettings, parse, validate
from qwen2_ascend.finetuning.exports import finish, is_all_done
from qwen2_ascend.finetuning.finetune import check_data
from qwen2_ascend.finetuning.saved_lora import SavedLora
from qwen2_ascend.launching import launched
from qwen2_ascend.training.plan import Found, RunPlan, folder_of, within
from qwen2_ascend.training.saved_run import SavedRun
from qwen2_ascend.training.setup import (
    begin,
    checkpoint_identity,
    from_sound_checkpoint,
    is_planned_only,
    log_resumed,
    train_and_report,
)

if TYPE_CHECKING:
    from qwen2_ascend.finetuning.deepspeed.engine import ZeroRun
    from qwen2_ascend.finetuning.deepspeed.lora_checkpoint import ZeroLora
    from qwen2_ascend.runtime import Runtime
    from qwen2_ascend.training.checkpointer import Checkpointer

Plan = RunPlan[ZeroFinetuneSettings]


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of `launch/finetune_qwen2_deepspeed.py` with these flags, or sys.argv's."""
    return launched(lambda: finetune(parse(arguments)), goes_on=True)


def finetune(settings: ZeroFinetuneSettings) -> None:
    """Tunes as `settings` say, as one rank of torchrun's or as a process alone.

    Raises:
        UserError: settings, data or checkpoint are not as they have to be.
        NonFiniteError: the loss or the gradient norm is not finite, and that is to end the run.
    """
    if not is_planned_only(settings, make_plan, validate):
        from_sound_checkpoint(settings, _finetune)


def _finetune(settings: ZeroFinetuneSettings) -> None:
    plan, runtime = begin(settings, make_plan, validate, check_data)
    if is_all_done(plan):
        finish(plan, runtime, True)
        return
    run, plan = prepare(plan, runtime)
    storage = lora_storage(run, plan)
    is_complete = train_and_report(run, plan, checkpointer(run, plan, storage))
    finish(plan, runtime, is_complete, storage)


def make_plan(settings: ZeroFinetuneSettings, found: Found | None = None) -> Plan:
    """Opens what --load names; reads headers only.

    The arguments are those of `training.plan.make_plan`.

    Raises:
        UserError: nothing usable is there, it contradicts the flags, or the run's end could not
            be written.
    """
    load = settings.model.load
    saved = find_saved_zero(load and folder_of("load", load, found))
    if load is None or saved is None:
        plan = megatron_path.plan_of_run(settings, found)
    else:
        if settings.lora.is_on and not settings.model.finetune:
            raise UserError(
                f"--load {load}: holds a run that tunes all weights; --finetune takes its weights "
                "alone, to put adapters on them."
            )
        model = replace(settings.model, load=saved.folder, finetune=True)
        told = found and found._replace(folders={**found.folders, "load": "."})
        plan = megatron_path.plan_of_run(replace(settings, model=model), told)
        folders = {**plan.found.folders, "load": within(load, saved.folder)}
        plan = replace(plan, found=plan.found._replace(folders=folders))
        plan = plan if settings.model.finetune else replace(plan, saved=saved)
    if isinstance(plan.saved, SavedRun):
        raise UserError(
            f"--load {load}: holds a run of megatron-core's, which launch/finetune_qwen2.py "
            "resumes; --finetune takes its weights alone."
        )
    return megatron_path.with_exports(plan) if found is None else plan


def prepare(plan: Plan, runtime: Runtime) -> tuple[ZeroRun, Plan]:
    """Data, model, engine and, when one is resumed, the state of the run; and its length.

    Raises:
        UserError: data or checkpoint are not as they have to be.
    """
    from qwen2_ascend.finetuning.deepspeed.checkpoint import resume_zero
    from qwen2_ascend.finetuning.deepspeed.engine import build_zero_run

    data = megatron_path.chat_data(plan)
    plan = plan.with_epochs(data.train.samples_per_epoch)
    run = build_zero_run(
        plan,
        runtime,
        train_data=data.train.with_num_samples(plan.length.num_samples),
        valid_data=data.valid,
        adapter=megatron_path.adapter_to_load(plan),
    )
    saved = plan.saved
    if isinstance(saved, SavedLora) and (storage := lora_storage(run, plan)):
        log_resumed(run, saved.folder, storage.resume(saved))
    elif isinstance(saved, SavedZero):
        log_resumed(run, saved.folder, resume_zero(run, saved))
    return run, plan


def checkpointer(
    run: ZeroRun, plan: Plan, storage: ZeroLora | None
) -> Callable[[Callable[[str], None]], Checkpointer]:
    """Makes what writes the run's checkpoints, given what prints a line."""
    from qwen2_ascend.finetuning.deepspeed.checkpoint import zero_checkpointer

    if storage is not None:
        return storage.checkpointer
    return partial(zero_checkpointer, run, checkpoint_identity(plan))


def lora_storage(run: ZeroRun, plan: Plan) -> ZeroLora | None:
    """What reads and writes the adapters; None where all weights are tuned."""
    if plan.lora is None:
        return None
    from qwen2_ascend.finetuning.deepspeed.lora_checkpoint import ZeroLora

    return ZeroLora(run, checkpoint_identity(plan), plan.lora, plan.base)
