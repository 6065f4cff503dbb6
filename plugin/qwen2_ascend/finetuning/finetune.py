"""Fine-tuning from the command line to the exit status: what `launch/finetune_qwen2.py` runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from qwen2_ascend.checkpoint.formats.peft_adapter import read_lora_config
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import Faults, UserError, raise_if
from qwen2_ascend.finetuning.saved_lora import SavedLora, find_saved_lora
from qwen2_ascend.finetuning.settings import F, FinetuneSettings, parse, validate
from qwen2_ascend.launching import launched
from qwen2_ascend.lora_config import LoraConfig
from qwen2_ascend.training.setup import (
    Say,
    Start,
    build_chunks,
    build_run,
    checkpoint_identity,
    find_start,
    resume_if_saved,
    say_resumed,
    start_runtime,
    train_and_report,
)

if TYPE_CHECKING:
    from qwen2_ascend.data.chat.build import ChatDatasets
    from qwen2_ascend.runtime import Runtime
    from qwen2_ascend.training.checkpointer import Checkpointer
    from qwen2_ascend.training.checkpointing import CheckpointIdentity
    from qwen2_ascend.training.loop import TrainingRun

F_co = TypeVar("F_co", bound=FinetuneSettings, covariant=True)
B = TypeVar("B", bound="Begin")


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
    begin = checked_begin(settings, find_begin, validate)
    runtime, say = start_runtime(begin.start.settings, begin.start.config)
    prepared = prepare(begin, runtime, say)
    train_and_report(prepared.run, prepared.identity, say, prepared.checkpointer)
    export_adapter(prepared, begin)
    runtime.close()
    if runtime.rank == 0:
        export_hugging_face(begin, say)


@dataclass(frozen=True, kw_only=True)
class Begin(Generic[F_co]):
    """Where a run begins, and with which adapters."""

    start: Start[F_co]
    lora: LoraConfig | None
    """None tunes all weights."""
    saved: SavedLora | None
    """The LoRA run that is resumed."""

    @property
    def base(self) -> Path | None:
        """Where the weights come from."""
        return self.start.source.folder if self.start.source else None

    @property
    def adapter(self) -> Path | None:
        """The PEFT folder that the adapters' values come from; without it they are new."""
        return self.saved.folder if self.saved else self.start.settings.lora.lora_load


def checked_begin(
    settings: F, find: Callable[[F], B], check: Callable[[F, Qwen2Config, int], None]
) -> B:
    """Where a run begins, once all is checked that can be without a process group.

    Args:
        settings: all flags.
        find: opens what they name.
        check: the rules between them, of a model and a number of ranks.

    Raises:
        UserError: settings, data or checkpoint are not as they have to be; every fault at once.
    """
    from qwen2_ascend.data.chat.check import check_chat_data

    faults = Faults()
    begin = faults.of(lambda: find(settings))
    if begin is not None:
        start = begin.start
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        faults.of(lambda: check(start.settings, start.config, world_size))
    faults.of(
        lambda: check_chat_data(
            settings.data,
            settings.chat,
            settings.tuning.stage,
            reads_rows=os.environ.get("RANK", "0") == "0",
        )
    )
    raise_if(faults)
    assert begin is not None
    return begin


def find_begin(settings: F) -> Begin[F]:
    """Opens what --load and --lora-load name; reads headers only.

    Raises:
        UserError: nothing usable is there, or it contradicts the flags.
    """
    saved = find_saved_lora(settings.model.load)
    if saved is None:
        start = find_start(settings)
        if settings.lora.is_on and start.saved is not None:
            raise UserError(
                f"--load {settings.model.load}: holds a run that tunes all weights; --finetune "
                "takes its weights alone, to put adapters on them."
            )
        lora = settings.lora_config()
        if settings.lora.lora_load is not None:
            given = read_lora_config(settings.lora.lora_load)
            lora = replace(given, dropout=settings.lora.lora_dropout)
        return Begin(start=start, lora=lora, saved=None)
    if settings.lora.is_on and settings.lora_config() != replace(
        saved.lora, dropout=settings.lora.lora_dropout
    ):
        raise UserError(
            f"--load {settings.model.load}: is a run with LoRA of rank {saved.lora.rank}, alpha "
            f"{saved.lora.alpha:g} on {', '.join(saved.lora.targets)}; say the same, or nothing."
        )
    base = settings.model.pretrained_checkpoint or saved.base
    if base is None or not base.exists():
        raise UserError(
            f"{saved.folder}: its base model was {base or 'random'}, which is not there; name it "
            "with --pretrained-checkpoint."
        )
    model = replace(settings.model, load=base, finetune=True)
    lora = replace(saved.lora, dropout=settings.lora.lora_dropout)
    return Begin(start=find_start(replace(settings, model=model)), lora=lora, saved=saved)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that can begin, and what its checkpoints say."""

    run: TrainingRun
    identity: CheckpointIdentity
    checkpointer: Callable[[Say], Checkpointer] | None
    """Makes what writes checkpoints; None writes all weights."""


def prepare(begin: Begin, runtime: Runtime, say: Say) -> Prepared:
    """Data, model, objective and, when one is resumed, the state of the run.

    Raises:
        UserError: data or checkpoint are not as they have to be.
    """
    start = begin.start
    data = chat_data(start, say)
    settings = start.settings.with_epochs(data.train.samples_per_epoch, runtime.world_size)
    num_samples = settings.train_iters(runtime.world_size)
    num_samples *= settings.global_batch_size(runtime.world_size)
    chunks = build_chunks(settings, start, runtime, say, **_model_options(settings))
    if begin.lora is not None:
        add_adapters(chunks, begin, say)
    run = build_run(
        settings,
        runtime,
        chunks,
        train_data=data.train.with_num_samples(num_samples),
        valid_data=data.valid,
    )
    identity = checkpoint_identity(settings, start)
    if settings.tuning.stage == "dpo":
        from qwen2_ascend.finetuning.dpo import prepare_dpo

        prepare_dpo(run, begin, say)
    if begin.lora is None:
        resume_if_saved(run, start, identity, say)
        return Prepared(run=run, identity=identity, checkpointer=None)
    from qwen2_ascend.finetuning.lora_checkpoint import lora_checkpointer, resume_lora

    if begin.saved is not None:
        notes = resume_lora(run, begin.saved, identity, begin.lora)
        say_resumed(run, begin.saved.folder, notes, say)
    make = partial(lora_checkpointer, run, identity, begin.lora, begin.base)
    return Prepared(run=run, identity=identity, checkpointer=make)


def add_adapters(chunks: Sequence[Any], begin: Begin, say: Say) -> None:
    """Freezes the weights and adds the adapters, new ones or those that are given.

    Raises:
        UserError: the given adapter is not of this model.
    """
    from qwen2_ascend.finetuning.adapter import load_adapter
    from qwen2_ascend.finetuning.lora import apply_lora

    settings, config, lora = begin.start.settings, begin.start.config, begin.lora
    assert lora is not None
    apply_lora(chunks, lora, config, settings.layout(), seed=settings.runtime.seed)
    given = begin.adapter
    if given is not None:
        load_adapter(chunks, lora, config, settings.layout(), given)
    say(lora.describe(given))


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


def export_adapter(prepared: Prepared, begin: Begin) -> None:
    """Writes the PEFT folder that --save-adapter asks for; every rank calls it."""
    folder = begin.start.settings.export.save_adapter
    if folder is None or begin.lora is None:
        return
    from qwen2_ascend.finetuning.adapter import save_adapter

    identity = prepared.identity
    base = str(begin.base) if begin.base else None
    save_adapter(
        prepared.run.chunks, begin.lora, identity.config, identity.layout, folder, base_model=base
    )


def export_hugging_face(begin: Begin, say: Say) -> None:
    """Writes the Hugging Face folder that --save-hf asks for, from the last checkpoint.

    Raises:
        UserError: the folder is in the way.
    """
    settings = begin.start.settings
    folder, checkpoint = settings.export.save_hf, settings.checkpoint.save
    if folder is None or checkpoint is None:
        return
    from qwen2_ascend.checkpoint.convert import to_hugging_face

    adapter = None
    if begin.lora is not None:
        saved = find_saved_lora(checkpoint)
        assert saved is not None and begin.base is not None
        checkpoint, adapter = begin.base, saved.folder
    to_hugging_face(checkpoint, folder, say, adapter=adapter)
