"""Fine-tuning from the command line to the exit status: what `launch/finetune_qwen2.py` runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2_ascend.finetuning.settings import FinetuneSettings, parse, validate
from qwen2_ascend.launching import launched
from qwen2_ascend.training.setup import (
    Say,
    Start,
    build_run,
    checkpoint_identity,
    find_start,
    resume_if_saved,
    start_runtime,
    train_and_report,
)

if TYPE_CHECKING:
    from qwen2_ascend.data.chat.build import ChatDatasets
    from qwen2_ascend.training.loop import TrainingRun


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `launch/finetune_qwen2.py`.

    Args:
        arguments: the flags; sys.argv's without it.

    Returns:
        The exit status, as `launched` has it.
    """
    return launched(lambda: finetune(parse(arguments)))


def finetune(settings: FinetuneSettings) -> None:
    """Tunes as `settings` say, as one rank of torchrun's or as a process alone.

    Raises:
        UserError: settings, data or checkpoint are not as they have to be.
        NonFiniteError: the loss or the gradient norm is not finite, and that is to end the run.
    """
    start = find_start(settings)
    validate(start.settings, start.config, int(os.environ.get("WORLD_SIZE", "1")))
    runtime, say = start_runtime(start.settings, start.config)
    prepared = prepare(start, runtime, say)
    train_and_report(prepared.run, start.config, prepared.identity, say)
    runtime.close()
    if runtime.rank == 0:
        export(start.settings, say)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that can begin, and what its checkpoints say."""

    run: TrainingRun
    identity: Any


def prepare(start: Start[FinetuneSettings], runtime: Any, say: Say) -> Prepared:
    """Data, model, objective and, when one is resumed, the state of the run.

    Raises:
        UserError: data or checkpoint are not as they have to be.
    """
    data = chat_data(start, say)
    settings = start.settings.with_epochs(data.train.samples_per_epoch, runtime.world_size)
    num_samples = settings.train_iters(runtime.world_size)
    num_samples *= settings.global_batch_size(runtime.world_size)
    run = build_run(
        settings,
        start,
        runtime,
        say,
        train_data=data.train.with_num_samples(num_samples),
        valid_data=data.valid,
        **_model_options(settings),
    )
    identity = checkpoint_identity(settings, start)
    if settings.tuning.stage == "dpo":
        from qwen2_ascend.finetuning.dpo import prepare_dpo

        prepare_dpo(run, start, say)
    resume_if_saved(run, start, identity, say)
    return Prepared(run=run, identity=identity)


def chat_data(start: Start[FinetuneSettings], say: Say) -> ChatDatasets:
    """Training data of one epoch and as much validation data as is asked for.

    Raises:
        UserError: the data is not there, damaged or too little.
    """
    from qwen2_ascend.data.chat.build import build_chat_datasets

    settings = start.settings
    data, world_size = settings.data, int(os.environ.get("WORLD_SIZE", "1"))
    built = build_chat_datasets(
        seq_length=settings.batch.seq_length,
        seed=settings.runtime.seed,
        num_samples=(None, data.eval_iters * settings.global_batch_size(world_size)),
        task=settings.tuning.stage,
        data_path=data.data_path,
        train_data_path=data.train_data_path,
        valid_data_path=data.valid_data_path,
        split=data.split,
        tokenizer=tokenizer_folder(start),
        chat=settings.chat,
        on_bad_row=data.on_bad_row,
        pack=data.pack,
        variable_seq_lengths=data.variable_seq_lengths,
        pad_to_multiple_of=data.pad_to_multiple_of,
        shuffle=not data.no_shuffle,
        vocab_size=start.config.vocab_size,
        data_cache_path=data.data_cache_path,
    )
    for note in built.notes:
        say(note)
    return built


def tokenizer_folder(start: Start[FinetuneSettings]) -> str | None:
    """Where the tokenizer is: named, beside the weights, or beside the config."""
    if name := start.settings.tuning.tokenizer_name_or_path:
        return name
    if start.source is not None:
        folders = {path.parent for path in start.source.side_files if "token" in path.name}
        if folders:
            return str(sorted(folders)[0])
    config = start.settings.model.config
    return config if config and Path(config).is_dir() else None


def _model_options(settings: FinetuneSettings) -> dict[str, Any]:
    """Fields of megatron-core's configuration that chats need."""
    if not settings.data.variable_seq_lengths:
        return {}
    # megatron-core asks for this dispatcher whether there are experts or not
    return {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}


def export(settings: FinetuneSettings, say: Say) -> None:
    """Writes the Hugging Face folder that --save-hf asks for, from the last checkpoint.

    Raises:
        UserError: the folder is in the way.
    """
    folder, checkpoint = settings.export.save_hf, settings.checkpoint.save
    if folder is None or checkpoint is None:
        return
    from qwen2_ascend.checkpoint.convert import Conversion, convert
    from qwen2_ascend.checkpoint.convert import prepare as prepare_conversion

    request = Conversion(load_dir=checkpoint, save_dir=folder, save_model_type="hf", verify=True)
    convert(prepare_conversion(request), say)
