"""From checked settings to a run that trains: what pretraining and fine-tuning share."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.launching import silence_foreign_warnings, voice
from qwen2_ascend.training.megatron_flags import pasted_notes
from qwen2_ascend.training.settings import TrainingSettings

if TYPE_CHECKING:
    from qwen2_ascend.checkpoint.source import Source
    from qwen2_ascend.runtime import Runtime
    from qwen2_ascend.telemetry.energy import Energy
    from qwen2_ascend.telemetry.instruments import Instruments
    from qwen2_ascend.training.checkpointer import Checkpointer
    from qwen2_ascend.training.checkpointing import CheckpointIdentity
    from qwen2_ascend.training.logging import Reporter
    from qwen2_ascend.training.loop import TrainingRun
    from qwen2_ascend.training.saved_run import SavedRun

Say = Callable[[str], None]
S = TypeVar("S", bound=TrainingSettings)
S_co = TypeVar("S_co", bound=TrainingSettings, covariant=True)


@dataclass(frozen=True, kw_only=True)
class Start(Generic[S_co]):
    """Where a run begins."""

    settings: S_co
    """With what the checkpoint settles filled in."""
    config: Qwen2Config
    source: Source | None
    """The weights, or None for random ones."""
    saved: SavedRun | None
    """The training state, where one is resumed."""


def find_start(settings: S) -> Start[S]:
    """Opens what --load names; reads headers only.

    Raises:
        UserError: nothing usable is there, or nothing says what the model is.
    """
    model = settings.model
    folder = model.load
    if folder is not None and _has_no_checkpoint(folder):
        if model.pretrained_checkpoint is None and folder != settings.checkpoint.save:
            raise UserError(
                f"--load {folder}: there is no checkpoint in it. (That is right only when "
                "--pretrained-checkpoint says where to start, or when --save is the same folder.)"
            )
        folder = None
    is_resumable = folder is not None and not model.finetune
    folder = folder or model.pretrained_checkpoint
    if folder is None:
        return Start(settings=settings, config=_config(model.config), source=None, saved=None)

    from qwen2_ascend.checkpoint.source import open_source

    if model.config is not None and not Path(model.config).exists():
        raise UserError(
            f"--config {model.config}: no such folder or file; with weights from {folder} give "
            "their Hugging Face folder, or nothing."
        )
    source = open_source(folder, None, model.config)
    saved = None
    if is_resumable and source.kind == "mg":
        from qwen2_ascend.training.saved_run import find_saved_run

        saved = find_saved_run(folder)
    if saved and model.padded_vocab_size is None and model.make_vocab_size_divisible_by is None:
        # the optimizer's state has as many rows as the weights had
        model = replace(model, padded_vocab_size=saved.padded_vocab_size)
    return Start(
        settings=replace(settings, model=model), config=source.config, source=source, saved=saved
    )


def _has_no_checkpoint(folder: Path) -> bool:
    """Not even a damaged one: the folder a run is going to save into, perhaps with its metrics."""
    if not folder.is_dir():
        return not folder.exists()
    signs = ("latest_*", "iter_*", "mp_rank_*", "*.safetensors*", "*.bin", "config.json")
    return not any(path for sign in signs for path in folder.glob(sign))


def _config(name: str | None) -> Qwen2Config:
    if name is None:
        raise UserError("give --load, or --config for random weights: nothing says which model.")
    return Qwen2Config.from_pretrained(name) if Path(name).exists() else Qwen2Config.named(name)


def _headline(settings: TrainingSettings, runtime: Runtime, config: Qwen2Config) -> str:
    parallel = settings.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    words = [f"TP{tp} PP{pp} DP{settings.data_parallel_size(runtime.world_size)}"]
    if per_chunk := parallel.num_layers_per_virtual_pipeline_stage:
        words.append(f"{per_chunk} layer(s) per virtual stage")
    if parallel.sequence_parallel and tp > 1:
        words.append("sequence parallel")
    if parallel.use_distributed_optimizer:
        words.append("distributed optimizer")
    precision = "bf16" if settings.precision.bf16 else "fp32"
    words.append("fp16" if settings.precision.fp16 else precision)
    words.append(f"{config.num_parameters:,} parameters")
    return f"{runtime.describe()}, {', '.join(words)}"


def start_runtime(settings: TrainingSettings, config: Qwen2Config) -> tuple[Runtime, Say]:
    """The device, the process groups of the layout and the seeds; and what prints the log.

    Raises:
        UserError: the device or the number of processes does not do.
    """
    from qwen2_ascend import runtime as runtimes
    from qwen2_ascend.telemetry.training_energy import require_power_source

    silence_foreign_warnings()
    runtime = runtimes.start(
        None if settings.runtime.device == "auto" else settings.runtime.device,
        mindspeed=settings.runtime.wants_mindspeed(),
        timeout_seconds=60 * settings.parallel.distributed_timeout_minutes,
        deterministic=settings.runtime.deterministic,
        megatron_arguments=megatron_arguments(settings),
    )
    say = voice(runtime.rank)
    raise_if(settings.fusion.faults(runtime.name))
    if settings.report.log_energy:
        require_power_source(runtime)
    say(_headline(settings, runtime, config))
    say(settings.fusion.describe(runtime.name))
    for note in (*pasted_notes(settings), *runtime.notes):
        say(note)
    runtimes.initialize_model_parallel(settings.layout(), config.num_layers)
    runtime.seed_all(settings.runtime.seed)
    return runtime, say


def megatron_arguments(settings: TrainingSettings) -> dict[str, Any]:
    """What MindSpeed is told of the run."""
    parallel, precision = settings.parallel, settings.precision
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        "bf16": precision.bf16,
        "fp16": precision.fp16,
    }


def build_chunks(
    settings: TrainingSettings, start: Start, runtime: Runtime, say: Say, **model_options: Any
) -> list[Any]:
    """This rank's model chunks with their weights, on the device.

    `runtime.initialize_model_parallel` has built the process groups of `settings.layout()`.

    Args:
        **model_options: of `build_model`, besides what the settings say.

    Raises:
        UserError: the weights do not fit the model.
    """
    from megatron.core import parallel_state

    from qwen2_ascend.checkpoint.load import load_checkpoint_weights
    from qwen2_ascend.model.build import build_model

    parallel, recompute = settings.parallel, settings.recompute
    layout, padded = settings.layout(), settings.padded_vocab_size(start.config)
    chunks = build_model(
        start.config,
        layout,
        padded_vocab_size=padded,
        dtype=dtype_name(settings),
        backend=settings.fusion.backend(runtime.name),
        plain=settings.fusion.plain,
        perform_initialization=start.source is None,
        sequence_parallel=parallel.sequence_parallel and layout.tp > 1,
        recompute_granularity=recompute.recompute_granularity,
        recompute_method=recompute.recompute_method,
        recompute_num_layers=recompute.recompute_num_layers,
        cross_entropy_chunk_size=recompute.cross_entropy_chunk_size,
        deterministic_mode=settings.runtime.deterministic,
        **model_options,
    )
    if start.source is not None:
        load_checkpoint_weights(
            chunks,
            _with_padding(start, padded),
            layout,
            padded_vocab_size=padded,
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            pp_stage=parallel_state.get_pipeline_model_parallel_rank(),
        )
        say(f"weights: {start.source.describe()}")
    else:
        say(f"weights: random, seed {settings.runtime.seed}")
    return [chunk.to(runtime.device) for chunk in chunks]


def _with_padding(start: Start, padded_vocab_size: int) -> Source:
    """The weights; of a run that goes on, the padding's rows too, which were trained as the others.

    Elsewhere padding is zero: other tools leave anything in those rows.
    """
    source = start.source
    assert source is not None
    if start.saved is None or start.saved.padded_vocab_size != padded_vocab_size:
        return source
    return replace(source, config=replace(source.config, vocab_size=padded_vocab_size))


def build_run(
    settings: TrainingSettings,
    runtime: Runtime,
    chunks: Sequence[Any],
    *,
    train_data: Any,
    valid_data: Any = None,
) -> TrainingRun:
    """Data parallelism, optimizer and schedule around `chunks`, at iteration 0."""
    from qwen2_ascend.training.loop import Progress, TrainingRun, wrap_chunks
    from qwen2_ascend.training.optimizer import build_optimizer
    from qwen2_ascend.training.schedule import build_schedule

    wrapped = wrap_chunks(chunks, settings.parallel)
    optimizer = build_optimizer(wrapped, settings)
    return TrainingRun(
        settings=settings,
        runtime=runtime,
        chunks=wrapped,
        optimizer=optimizer,
        schedule=build_schedule(
            optimizer,
            settings.optimizer,
            train_iters=settings.train_iters(runtime.world_size),
            global_batch_size=settings.global_batch_size(runtime.world_size),
        ),
        train_data=train_data,
        valid_data=valid_data,
        progress=Progress(),
    )


def resume_if_saved(run: TrainingRun, start: Start, identity: CheckpointIdentity, say: Say) -> None:
    """Goes on from `start.saved`, if there is a training state.

    Raises:
        UserError: it is not of this model.
    """
    from qwen2_ascend.training.checkpointing import resume

    if start.saved is None:
        return
    notes = resume(run, start.saved, identity, run.settings.checkpoint)
    say_resumed(run, start.saved.folder, notes, say)


def say_resumed(run: TrainingRun, folder: Path, notes: Sequence[str], say: Say) -> None:
    """Tells where the run goes on, what is not as it was, and whether anything is left to do."""
    for note in notes:
        say(note)
    say(f"resumed {folder} at iteration {run.progress.iteration}")
    if run.progress.iteration >= run.train_iters:
        say(f"nothing is left to do: the run ends at iteration {run.train_iters}")


def checkpoint_identity(settings: TrainingSettings, start: Start) -> CheckpointIdentity:
    """What checkpoints of this run say about its model."""
    from qwen2_ascend.training.checkpointing import CheckpointIdentity

    return CheckpointIdentity(
        config=start.config,
        layout=settings.layout(),
        padded_vocab_size=settings.padded_vocab_size(start.config),
        dtype=dtype_name(settings),
        side_files=run_side_files(settings, start),
    )


def run_side_files(settings: TrainingSettings, start: Start) -> Mapping[Path, bytes]:
    """config.json, with the dtype that is trained in, and the tokenizer's files."""
    from qwen2_ascend.checkpoint.formats.hugging_face import side_files
    from qwen2_ascend.checkpoint.target import read_side_files

    dtype = dtype_name(settings)
    if start.source is not None:
        return read_side_files(start.source.side_files, dtype)
    folder = Path(settings.model.config or "")
    if folder.is_file():
        folder = folder.parent
    if found := side_files(folder):
        return read_side_files(found, dtype)
    config = replace(start.config, dtype=dtype).to_hugging_face()
    return {Path("config.json"): (json.dumps(config, indent=2) + "\n").encode()}


def dtype_name(settings: TrainingSettings) -> str:
    """What the model is computed in: fp32, bf16 or fp16."""
    if settings.precision.bf16:
        return "bf16"
    return "fp16" if settings.precision.fp16 else "fp32"


def train_and_report(
    run: TrainingRun,
    identity: CheckpointIdentity,
    say: Say,
    checkpointer: Callable[[Say], Checkpointer] | None = None,
) -> None:
    """Trains to the end or until told to stop, with a log and checkpoints where they are asked for.

    Args:
        run: begins at its progress.
        identity: of its model.
        say: prints a line.
        checkpointer: makes what writes checkpoints, given what prints a line; by default it writes
            all weights.
    """
    from qwen2_ascend.telemetry.instruments import Instruments
    from qwen2_ascend.training.checkpointing import megatron_checkpointer

    settings = run.settings
    reporter = _reporter(run, identity.config, identity.padded_vocab_size)
    instruments = Instruments(run, reporter.tokens_per_step, say)
    with contextlib.ExitStack() as stack:
        opened = None
        if settings.checkpoint.save:
            make = checkpointer or partial(megatron_checkpointer, run, identity)
            opened = stack.enter_context(contextlib.closing(make(reporter.interrupt)))
            opened.open()
        _train(run, reporter, instruments, opened, say)


def _train(
    run: TrainingRun,
    reporter: Reporter,
    instruments: Instruments,
    checkpointer: Checkpointer | None,
    say: Say,
) -> None:
    from qwen2_ascend.training.loop import train
    from qwen2_ascend.training.signals import StopSignal

    with StopSignal(run.settings.runtime.exit_signal_handler) as signal:
        try:
            reason = train(
                run,
                on_step=lambda result, seconds: reporter.step(
                    _step(run, result, seconds, instruments.step(seconds))
                ),
                on_validation=lambda loss: reporter.validation(run.progress.iteration, loss),
                checkpointer=checkpointer,
                stop_wanted=lambda: signal.received,
            )
            instruments.finish()
        finally:
            instruments.close()
            reporter.close()
    if reason:
        say(f"stopped after iteration {run.progress.iteration}: {reason}")


def _reporter(run: TrainingRun, config: Qwen2Config, padded_vocab_size: int) -> Reporter:
    from qwen2_ascend.training.logging import Reporter, train_flops

    settings = run.settings
    sequences = run.global_batch_size * run.rows_per_sample
    length = settings.batch.seq_length
    flops = train_flops(
        config, num_sequences=sequences, seq_length=length, padded_vocab_size=padded_vocab_size
    )
    return Reporter(
        train_iters=run.train_iters,
        first_iteration=run.progress.iteration,
        log_interval=settings.report.log_interval,
        tokens_per_step=sequences * length,
        flops_per_step=None if run.runtime.simulated else flops,
        world_size=run.runtime.world_size,
        report_dir=settings.report.report_dir or settings.checkpoint.save,
        tensorboard_dir=settings.report.tensorboard_dir,
        silent=run.runtime.rank != 0,
    )


def _step(run: TrainingRun, result: Any, seconds: float, energy: Energy | None) -> Any:
    from qwen2_ascend.training.logging import Step

    return Step(
        iteration=run.progress.iteration,
        consumed_samples=run.progress.consumed_samples,
        loss=result.loss,
        grad_norm=result.grad_norm,
        lr=result.lr,
        num_tokens=result.num_tokens,
        seconds=seconds,
        updated=result.updated,
        loss_scale=run.loss_scale(),
        peak_memory_bytes=None if run.runtime.simulated else result.peak_memory_bytes,
        metrics=result.metrics,
        energy=energy,
    )
