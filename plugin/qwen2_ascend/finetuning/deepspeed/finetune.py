"""From the command line to the exit status: what `launch/finetune_qwen2_deepspeed.py` runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from qwen2_ascend.errors import UserError
from qwen2_ascend.finetuning import finetune as megatron_path
from qwen2_ascend.finetuning.deepspeed.saved import SavedZero, find_saved_zero
from qwen2_ascend.finetuning.deepspeed.settings import ZeroFinetuneSettings, parse, validate
from qwen2_ascend.finetuning.finetune import Begin, chat_data, checked_begin
from qwen2_ascend.launching import launched
from qwen2_ascend.training.setup import (
    Say,
    checkpoint_identity,
    say_resumed,
    start_runtime,
    train_and_report,
)

if TYPE_CHECKING:
    from qwen2_ascend.finetuning.deepspeed.engine import ZeroRun
    from qwen2_ascend.runtime import Runtime
    from qwen2_ascend.training.checkpointer import Checkpointer
    from qwen2_ascend.training.checkpointing import CheckpointIdentity


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `launch/finetune_qwen2_deepspeed.py`.

    Args:
        arguments: the flags; sys.argv's without it.

    Returns:
        The exit status, as `launched` has it.
    """
    return launched(lambda: finetune(parse(arguments)))


def finetune(settings: ZeroFinetuneSettings) -> None:
    """Tunes as `settings` say, as one rank of torchrun's or as a process alone.

    Raises:
        UserError: settings, data or checkpoint are not as they have to be.
        NonFiniteError: the loss or the gradient norm is not finite, and that is to end the run.
    """
    begin = checked_begin(settings, find_begin, validate)
    runtime, say = start_runtime(begin.start.settings, begin.start.config)
    run, identity = prepare(begin, runtime, say)
    train_and_report(run, identity, say, partial(checkpointer, run, identity, begin))
    export_adapter(run, begin)
    runtime.close()
    if runtime.rank == 0:
        export_hugging_face(begin, say)


@dataclass(frozen=True, kw_only=True)
class ZeroBegin(Begin[ZeroFinetuneSettings]):
    """Where a run begins; `saved` is the LoRA run that is resumed."""

    saved_zero: SavedZero | None
    """The run of all weights that is resumed."""


def find_begin(settings: ZeroFinetuneSettings) -> ZeroBegin:
    """Opens what --load names; reads headers only.

    Raises:
        UserError: nothing usable is there, or it contradicts the flags.
    """
    load = settings.model.load
    saved = find_saved_zero(load)
    if saved is not None:
        if settings.lora.is_on and not settings.model.finetune:
            raise UserError(
                f"--load {load}: holds a run that tunes all weights; --finetune takes its weights "
                "alone, to put adapters on them."
            )
        model = replace(settings.model, load=saved.folder, finetune=True)
        begin = megatron_path.find_begin(replace(settings, model=model))
        saved = None if settings.model.finetune else saved
    else:
        begin = megatron_path.find_begin(settings)
    if begin.start.saved is not None:
        raise UserError(
            f"--load {load}: holds a run of megatron-core's, which launch/finetune_qwen2.py "
            "resumes; --finetune takes its weights alone."
        )
    return ZeroBegin(start=begin.start, lora=begin.lora, saved=begin.saved, saved_zero=saved)


def prepare(begin: ZeroBegin, runtime: Runtime, say: Say) -> tuple[ZeroRun, CheckpointIdentity]:
    """Data, model, engine and, when one is resumed, the state of the run.

    Raises:
        UserError: data or checkpoint are not as they have to be.
    """
    from qwen2_ascend.finetuning.deepspeed.engine import build_zero_run

    start = begin.start
    data = chat_data(start, say)
    settings = start.settings.with_epochs(data.train.samples_per_epoch, runtime.world_size)
    num_samples = settings.train_iters(runtime.world_size)
    num_samples *= settings.global_batch_size(runtime.world_size)
    run = build_zero_run(
        settings,
        start,
        runtime,
        say,
        train_data=data.train.with_num_samples(num_samples),
        valid_data=data.valid,
        lora=begin.lora,
        adapter=begin.adapter,
    )
    identity = checkpoint_identity(settings, start)
    resume_if_saved(run, begin, identity, say)
    return run, identity


def resume_if_saved(run: ZeroRun, begin: ZeroBegin, identity: CheckpointIdentity, say: Say) -> None:
    """Goes on from the checkpoint that --load holds, if there is one.

    Raises:
        UserError: it is not of this model, or does not fit the ranks.
    """
    from qwen2_ascend.finetuning.deepspeed.checkpoint import resume_zero
    from qwen2_ascend.finetuning.deepspeed.lora_checkpoint import resume_lora

    if begin.saved is not None and begin.lora is not None:
        folder = begin.saved.folder
        notes = resume_lora(run, begin.saved, identity, begin.lora)
    elif begin.saved_zero is not None:
        folder = begin.saved_zero.folder
        notes = resume_zero(run, begin.saved_zero)
    else:
        return
    say_resumed(run, folder, notes, say)


def checkpointer(
    run: ZeroRun, identity: CheckpointIdentity, begin: ZeroBegin, log: Say
) -> Checkpointer:
    """What writes the run's checkpoints."""
    from qwen2_ascend.finetuning.deepspeed.checkpoint import zero_checkpointer
    from qwen2_ascend.finetuning.deepspeed.lora_checkpoint import lora_checkpointer

    if begin.lora is None:
        return zero_checkpointer(run, identity, log)
    return lora_checkpointer(run, identity, begin.lora, begin.base, log)


def export_adapter(run: ZeroRun, begin: ZeroBegin) -> None:
    """Writes the PEFT folder that --save-adapter asks for; every rank calls it."""
    from qwen2_ascend.finetuning.deepspeed.lora_checkpoint import save_adapter

    folder = begin.start.settings.export.save_adapter
    if folder is not None and begin.lora is not None:
        save_adapter(run, begin.lora, begin.base, folder)


def export_hugging_face(begin: ZeroBegin, say: Say) -> None:
    """Writes the Hugging Face folder that --save-hf asks for, from the last checkpoint.

    Raises:
        UserError: the folder is in the way.
    """
    if begin.lora is not None:
        megatron_path.export_hugging_face(begin, say)
        return
    settings = begin.start.settings
    folder, saved = settings.export.save_hf, find_saved_zero(settings.checkpoint.save)
    if folder is None or saved is None:
        return
    from qwen2_ascend.checkpoint.convert import to_hugging_face

    to_hugging_face(saved.folder, folder, say)
