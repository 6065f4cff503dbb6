"""Fine-tuning after the start: data, model, objective and training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen2_ascend.data.chat.build import ChatDatasetBuilder, ChatDatasets
from qwen2_ascend.finetuning.adapter import load_adapter
from qwen2_ascend.finetuning.base_model import base_marks
from qwen2_ascend.finetuning.dpo import prepare_dpo
from qwen2_ascend.finetuning.exports import finish, is_all_done
from qwen2_ascend.finetuning.lora import apply_lora
from qwen2_ascend.finetuning.lora_checkpoint import MegatronLora
from qwen2_ascend.finetuning.saved_lora import SavedLora
from qwen2_ascend.finetuning.settings import FinetuneSettings
from qwen2_ascend.finetuning.taught import tokenizer_folder
from qwen2_ascend.runtime import Runtime
from qwen2_ascend.runtime.agreement import made_by_first
from qwen2_ascend.training.loop import TrainingRun
from qwen2_ascend.training.plan import RunPlan
from qwen2_ascend.training.setup import (
    build_chunks,
    build_run,
    checkpoint_identity,
    log_resumed,
    resume_if_saved,
    train_and_report,
)

logger = logging.getLogger(__name__)


def tune(plan: RunPlan[FinetuneSettings], runtime: Runtime) -> None:
    """Tunes to the end or until told to stop, makes the exports, and parts the ranks.

    Raises:
        UserError: data or checkpoint are not as they have to be.
    """
    if is_all_done(plan):
        finish(plan, runtime, True)
        return
    run, plan = prepare(plan, runtime)
    storage = lora_storage(run, plan)
    is_complete = train_and_report(run, plan, storage and storage.checkpointer)
    finish(plan, runtime, is_complete, storage)


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
        prepare_dpo(run, plan)
    mark_base(run, plan)
    resume_if_saved(run, plan)
    if isinstance(plan.saved, SavedLora) and (storage := lora_storage(run, plan)):
        log_resumed(run, plan.saved.folder, storage.resume(plan.saved))
    return run, plan


def mark_base(run: TrainingRun, plan: RunPlan[Any]) -> None:
    """Has the checkpoints of a LoRA run say what its base model is; rank 0 looks."""
    if plan.lora is not None and plan.settings.checkpoint.save is not None:
        run.marks = {**run.marks, **made_by_first(lambda: base_marks(plan))}


def lora_storage(run: TrainingRun, plan: RunPlan[FinetuneSettings]) -> MegatronLora | None:
    """What reads and writes the adapters; None where all weights are tuned."""
    if plan.lora is None:
        return None
    return MegatronLora(run, checkpoint_identity(plan), plan.lora, plan.base)


def add_adapters(chunks: Sequence[Any], plan: RunPlan[FinetuneSettings]) -> None:
    """Freezes the weights and adds the adapters, new ones or those that are given.

    Raises:
        UserError: the given adapter is not of this model.
    """
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
        num_samples=(None, (data.eval_iters or 0) * global_batch_size),
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
