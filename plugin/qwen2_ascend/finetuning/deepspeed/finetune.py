"""From the command line to the exit status: what `launch/finetune_qwen2_deepspeed.py` runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, cast

from qwen2_ascend.errors import UserError
from qwen2_ascend.finetuning.deepspeed.saved import SavedZero, find_saved_zero
from qwen2_ascend.finetuning.deepspeed.settings import ZeroFinetuneSettings, parse, validate
from qwen2_ascend.finetuning.finetune import chat_data
from qwen2_ascend.launching import launched
from qwen2_ascend.training.setup import (
    Say,
    Start,
    checkpoint_identity,
    find_start,
    start_runtime,
    train_and_report,
)

if TYPE_CHECKING:
    from qwen2_ascend.finetuning.deepspeed.engine import ZeroRun
    from qwen2_ascend.finetuning.settings import FinetuneSettings
    from qwen2_ascend.runtime import Runtime
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
    begin = find_begin(settings)
    start = begin.start
    validate(start.settings, start.config, int(os.environ.get("WORLD_SIZE", "1")))
    runtime, say = start_runtime(start.settings, start.config)
    from qwen2_ascend.finetuning.deepspeed.checkpoint import save_zero_checkpoint

    run, identity = prepare(begin, runtime, say)
    train_and_report(run, identity, say, partial(save_zero_checkpoint, run, identity))
    runtime.close()
    if runtime.rank == 0:
        export_hugging_face(start.settings, say)


@dataclass(frozen=True, kw_only=True)
class Begin:
    """Where a run begins."""

    start: Start[ZeroFinetuneSettings]
    saved: SavedZero | None
    """The run that is resumed."""


def find_begin(settings: ZeroFinetuneSettings) -> Begin:
    """Opens what --load names; reads headers only.

    Raises:
        UserError: nothing usable is there, or it contradicts the flags.
    """
    saved = find_saved_zero(settings.model.load)
    if saved is not None:
        model = replace(settings.model, load=saved.folder, finetune=True)
        start = find_start(replace(settings, model=model))
        return Begin(start=start, saved=None if settings.model.finetune else saved)
    start = find_start(settings)
    if start.saved is not None:
        raise UserError(
            f"--load {settings.model.load}: holds a run of megatron-core's, which "
            "launch/finetune_qwen2.py resumes; --finetune takes its weights alone."
        )
    return Begin(start=start, saved=None)


def prepare(begin: Begin, runtime: Runtime, say: Say) -> tuple[ZeroRun, CheckpointIdentity]:
    """Data, model, engine and, when one is resumed, the state of the run.

    Raises:
        UserError: data or checkpoint are not as they have to be.
    """
    from qwen2_ascend.finetuning.deepspeed.engine import build_zero_run

    start = begin.start
    data = chat_data(cast("Start[FinetuneSettings]", start), say)
    epoch = data.train.samples_per_epoch
    settings = cast(ZeroFinetuneSettings, start.settings.with_epochs(epoch, runtime.world_size))
    num_samples = settings.train_iters(runtime.world_size)
    num_samples *= settings.global_batch_size(runtime.world_size)
    run = build_zero_run(
        settings,
        start,
        runtime,
        say,
        train_data=data.train.with_num_samples(num_samples),
        valid_data=data.valid,
    )
    if begin.saved is not None:
        from qwen2_ascend.finetuning.deepspeed.checkpoint import resume_zero

        for note in resume_zero(run, begin.saved):
            say(note)
        say(f"resumed {begin.saved.folder} at iteration {run.progress.iteration}")
        if run.progress.iteration >= run.train_iters:
            say(f"nothing is left to do: the run ends at iteration {run.train_iters}")
    return run, checkpoint_identity(settings, start)


def export_hugging_face(settings: ZeroFinetuneSettings, say: Say) -> None:
    """Writes the Hugging Face folder that --save-hf asks for, from the last checkpoint.

    Raises:
        UserError: the folder is in the way.
    """
    folder, saved = settings.export.save_hf, find_saved_zero(settings.checkpoint.save)
    if folder is None or saved is None:
        return
    from qwen2_ascend.checkpoint import convert

    request = convert.Conversion(
        load_dir=saved.folder, save_dir=folder, save_model_type="hf", verify=True
    )
    convert.convert(convert.prepare(request), say)
