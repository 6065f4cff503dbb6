"""Fine-tuning from the command line to the exit status: what `launch/finetune_qwen2.py` runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2_ascend.checkpoint.formats.peft_adapter import read_lora_config
from qwen2_ascend.data.chat.build import ChatDatasetBuilder
from qwen2_ascend.data.chat.check import check_chat_data
from qwen2_ascend.errors import UserError
from qwen2_ascend.finetuning.exports import find_exports, finish, is_all_done
from qwen2_ascend.finetuning.saved_lora import SavedLora, find_saved_lora
from qwen2_ascend.finetuning.settings import F, FinetuneSettings, parse, validate
from qwen2_ascend.finetuning.taught import tokenizer_folder
from qwen2_ascend.launching import launched
from qwen2_ascend.training import plan as plans
from qwen2_ascend.training.plan import Found, RunPlan, folder_of, within
from qwen2_ascend.training.setup import (
    begin,
    build_chunks,
    build_run,
    checkpoint_identity,
    from_sound_checkpoint,
    is_planned_only,
    log_resumed,
    resume_if_saved,
    train_and_report,
)

if TYPE_CHECKING:
    from qwen2_ascend.data.chat.build import ChatDatasets
    from qwen2_ascend.finetuning.lora_checkpoint import MegatronLora
    from qwen2_ascend.runtime import Runtime
    from qwen2_ascend.training.loop import TrainingRun

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of `launch/finetune_qwen2.py` with these flags, or sys.argv's."""
    return launched(lambda: finetune(parse(arguments)), goes_on=True)


def finetune(settings: FinetuneSettings) -> None:
    """Tunes as `settings` say, as one rank of torchrun's or as a process alone.

    Raises:
        UserError: settings, data or checkpoint are not as they have to be.
        NonFiniteError: the loss or the gradient norm is not finite, and that is to end the run.
    """
    if not is_planned_only(settings, make_plan, validate):
        from_sound_checkpoint(settings, _finetune)


def _finetune(settings: FinetuneSettings) -> None:
    plan, runtime = begin(settings, make_plan, validate, check_data)
    if is_all_done(plan):
        finish(plan, runtime, True)
        return
    run, plan = prepare(plan, runtime)
    storage = lora_storage(run, plan)
    is_complete = train_and_report(run, plan, storage and storage.checkpointer)
    finish(plan, runtime, is_complete, storage)


def check_data(settings: FinetuneSettings) -> None:
    """What can be said of the data before there is a process group.

    Raises:
        UserError: every fault at once.
    """
    check_chat_data(settings.data, settings.chat, settings.tuning.stage)


def make_plan(settings: F, found: Found | None = None) -> RunPlan[F]:
    """Opens what --load and --lora-load name; reads headers only.

    The arguments are those of `training.plan.make_plan`.

    Raises:
        UserError: nothing usable is there, it contradicts the flags, or the run's end could not
            be written.
    """
    plan = plan_of_run(settings, found)
    return with_exports(plan) if found is None else plan


def with_exports(plan: RunPlan[F]) -> RunPlan[F]:
    """The plan with the exports that are there; rank 0 looks.

    Raises:
        UserError: an export could not be made at the end.
    """
    return replace(plan, found=plan.found._replace(exports=find_exports(plan)))


def plan_of_run(settings: F, found: Found | None) -> RunPlan[F]:
    """The plan that `make_plan` makes, without the exports."""
    plan = _opened(settings, found)
    if plan.lora is not None and plan.source is not None and plan.config != plan.source.config:
        raise UserError(
            "--rope-scaling-type yarn: an adapter does not say how its base model counts "
            f"positions; write rope_scaling into the config.json of {plan.base} instead."
        )
    return plan


def _opened(settings: F, found: Found | None) -> RunPlan[F]:
    load = settings.model.load
    saved = find_saved_lora(load and folder_of("load", load, found))
    if load is None or saved is None:
        plan = plans.make_plan(settings, found)
        if settings.lora.is_on and plan.saved is not None:
            raise UserError(
                f"--load {load}: holds a run that tunes all weights; --finetune takes its weights "
                "alone, to put adapters on them."
            )
        lora = settings.lora_config()
        if settings.lora.lora_load is not None:
            given = read_lora_config(settings.lora.lora_load)
            lora = replace(given, dropout=settings.lora.lora_dropout)
        return replace(plan, lora=lora)
    if settings.lora.is_on and settings.lora_config() != replace(
        saved.lora, dropout=settings.lora.lora_dropout
    ):
        raise UserError(
            f"--load {load}: is a run with LoRA of rank {saved.lora.rank}, alpha "
            f"{saved.lora.alpha:g} on {', '.join(saved.lora.targets)}; say the same, or nothing."
        )
    base = settings.model.pretrained_checkpoint or saved.base
    if base is None or not base.exists():
        raise UserError(
            f"{saved.folder}: its base model was {base or 'random'}, which is not there; name it "
            "with --pretrained-checkpoint."
        )
    # the base is opened as --pretrained-checkpoint is
    model = replace(settings.model, load=None, pretrained_checkpoint=base)
    plan = plans.make_plan(replace(settings, model=model), found)
    folders = {**plan.found.folders, "load": within(load, saved.folder)}
    return replace(
        plan,
        saved=saved,
        lora=replace(saved.lora, dropout=settings.lora.lora_dropout),
        found=plan.found._replace(folders=folders),
    )


def prepare(
    plan: RunPlan[FinetuneSettings], runtime: Runtime
) -> tuple[TrainingRun, RunPlan[FinetuneSettings]]:
    """Data, model, objective and, when one is resumed, the state of the run; and its length.

    Raises:
        UserError: data or checkpoint are not as they have to be.
    """
    data = chat_data(plan)
    plan = plan.with_epochs(data.train.samples_per_epoch)
    settings = plan.settings
    chunks = build_chunks(plan, runtime, **_model_options(settings))
    if plan.lora is not None:
        add_adapters(chunks, plan)
    run = build_run(
        settings,
        runtime,
        chunks,
        train_data=data.train.with_num_samples(plan.length.num_samples),
        valid_data=data.valid,
        length=plan.length,
    )
    if settings.tuning.stage == "dpo":
        from qwen2_ascend.finetuning.dpo import prepare_dpo

        prepare_dpo(run, plan)
    resume_if_saved(run, plan)
    if isinstance(plan.saved, SavedLora) and (storage := lora_storage(run, plan)):
        log_resumed(run, plan.saved.folder, storage.resume(plan.saved))
    return run, plan


def lora_storage(run: TrainingRun, plan: RunPlan[FinetuneSettings]) -> MegatronLora | None:
    """What reads and writes the adapters; None where all weights are tuned."""
    if plan.lora is None:
        return None
    from qwen2_ascend.finetuning.lora_checkpoint import MegatronLora

    return MegatronLora(run, checkpoint_identity(plan), plan.lora, plan.base)


def add_adapters(chunks: Sequence[Any], plan: RunPlan[FinetuneSettings]) -> None:
    """Freezes the weights and adds the adapters, new ones or those that are given.

    Raises:
        UserError: the given adapter is not of this model.
    """
    from qwen2_ascend.finetuning.adapter import load_adapter
    from qwen2_ascend.finetuning.lora import apply_lora

    config, layout, lora = plan.config, plan.layout, plan.lora
    assert lora is not None
    apply_lora(chunks, lora, config, layout, seed=plan.settings.runtime.seed)
    given = adapter_to_load(plan)
    if given is not None:
        load_adapter(chunks, lora, config, layout, given)
    logger.info(lora.describe(given))


def adapter_to_load(plan: RunPlan[FinetuneSettings]) -> Path | None:
    """The PEFT folder that the adapters' values come from; without it they are new."""
    return plan.saved.folder if isinstance(plan.saved, SavedLora) else plan.settings.lora.lora_load


def chat_data(plan: RunPlan[FinetuneSettings]) -> ChatDatasets:
    """Training data of one epoch and as much validation data as is asked for.

    Raises:
        UserError: the data is not there, damaged or too little.
    """
    settings = plan.settings
    data, global_batch_size = settings.data, settings.global_batch_size(plan.world_size)
    built = ChatDatasetBuilder(
        seq_length=settings.batch.seq_length,
        seed=settings.runtime.seed,
        num_samples=(None, data.eval_iters * global_batch_size),
        task=settings.tuning.stage,
        data_path=data.data_path,
        train_data_path=data.train_data_path,
        valid_data_path=data.valid_data_path,
        split=data.split,
        tokenizer=tokenizer_folder(plan),
        chat=settings.chat,
        on_bad_row=data.on_bad_row,
        pack=data.pack,
        variable_seq_lengths=data.variable_seq_lengths,
        pad_to_multiple_of=settings.pad_to_multiple_of,
        shuffle=not data.no_shuffle,
        vocab_size=plan.config.vocab_size,
        data_cache_path=data.data_cache_path,
        keep_chats_apart=settings.keeps_apart,
    ).build()
    for note in built.notes:
        logger.info(note)
    if data.variable_seq_lengths and settings.pad_to_multiple_of > data.pad_to_multiple_of:
        logger.info(
            f"batches are padded to a multiple of {settings.pad_to_multiple_of} tokens, which "
            "are shared out to the ranks that share a sequence"
        )
    return built


def _model_options(settings: FinetuneSettings) -> dict[str, Any]:
    """Fields of megatron-core's configuration that chats need."""
    if not settings.data.variable_seq_lengths:
        return {}
    # megatron-core asks for this dispatcher whether there are experts or not
    return {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}
