"""Fine-tuning by DeepSpeed ZeRO after the start: data, engine and training."""

from __future__ import annotations

from collections.abc import Callable

from qwen2_ascend.finetuning.deepspeed.checkpoint import resume_zero, zero_checkpointer
from qwen2_ascend.finetuning.deepspeed.engine import ZeroRun, build_zero_run
from qwen2_ascend.finetuning.deepspeed.lora_checkpoint import ZeroLora
from qwen2_ascend.finetuning.deepspeed.saved import SavedZero
from qwen2_ascend.finetuning.deepspeed.settings import ZeroFinetuneSettings
from qwen2_ascend.finetuning.exports import finish, is_all_done
from qwen2_ascend.finetuning.finetune import adapter_to_load, chat_data, mark_base
from qwen2_ascend.finetuning.saved_lora import SavedLora
from qwen2_ascend.runtime import Runtime
from qwen2_ascend.training.checkpointer import Checkpointer
from qwen2_ascend.training.plan import RunPlan
from qwen2_ascend.training.setup import checkpoint_identity, log_resumed, train_and_report

Plan = RunPlan[ZeroFinetuneSettings]


def tune(plan: Plan, runtime: Runtime) -> None:
    """Tunes to the end or until told to stop, makes the exports, and parts the ranks.

    Raises:
        UserError: data or checkpoint are not as they have to be.
    """
    if is_all_done(plan):
        finish(plan, runtime, True)
        return
    run, plan = prepare(plan, runtime)
    storage = lora_storage(run, plan)
    is_complete = train_and_report(run, plan, checkpointer(run, plan, storage))
    finish(plan, runtime, is_complete, storage)


def prepare(plan: Plan, runtime: Runtime) -> tuple[ZeroRun, Plan]:
    """Data, model, engine and, when one is resumed, the state of the run; and its length.

    Raises:
        UserError: data or checkpoint are not as they have to be.
    """
    data = chat_data(plan)
    plan = plan.with_epochs(data.train.samples_per_epoch)
    run = build_zero_run(
        plan,
        runtime,
        train_data=data.train.with_num_samples(plan.length.num_samples),
        valid_data=data.valid,
        adapter=adapter_to_load(plan),
    )
    mark_base(run, plan)
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
    if storage is not None:
        return storage.checkpointer
    return lambda log: zero_checkpointer(run, checkpoint_identity(plan), log)


def lora_storage(run: ZeroRun, plan: Plan) -> ZeroLora | None:
    """What reads and writes the adapters; None where all weights are tuned."""
    if plan.lora is None:
        return None
    return ZeroLora(run, checkpoint_identity(plan), plan.lora, plan.base)
