"""Pretraining from the command line to the exit status: what `launch/pretrain_qwen2.py` runs.

Imports of torch and megatron-core wait until the settings are known to be right: `--help` and
refusals answer at once, and `--mindspeed` has to come before megatron-core.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2_ascend.cli import EXIT_BROKEN_PIPE, EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USER_ERROR
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError
from qwen2_ascend.training.settings import PretrainSettings, parse, validate

if TYPE_CHECKING:
    from qwen2_ascend.checkpoint.source import Source
    from qwen2_ascend.runtime import Runtime
    from qwen2_ascend.training.checkpointing import CheckpointIdentity
    from qwen2_ascend.training.logging import Reporter
    from qwen2_ascend.training.loop import TrainingRun
    from qwen2_ascend.training.saved_run import SavedRun

FOREIGN_WARNINGS = (
    # torch 2.13 has new names for what megatron-core calls by its old ones
    "`(torch.distributed.[a-z_]*|load_state_dict)` is deprecated",
    "Please use DTensor instead",
    # about CUDA streams
    "When using [a-z ]* it is recommended to set the environment variable CUDA_DEVICE_MAX",
    # megatron-core looks at .grad of its slices, which have none, before it sets it
    "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
)
"""Beginnings of warnings about code that is not this project's, which no user can act on."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `launch/pretrain_qwen2.py`.

    Args:
        arguments: the flags; sys.argv's without it.

    Returns:
        0; 2 for a mistake in what was asked for; 1 for a failure. What is wrong is printed by
        rank 0, and handed to torchrun, which puts the first failure of any rank under its own
        lines.
    """
    return _ended(lambda: pretrain(parse(arguments)))


def pretrain(settings: PretrainSettings) -> None:
    """Trains as `settings` say, as one rank of torchrun's or as a process alone.

    Raises:
        UserError: settings, data or checkpoint are not as they have to be.
        NonFiniteError: the loss or the gradient norm is not finite, and that is to end the run.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    start = find_start(settings)
    settings = start.settings
    validate(settings, start.config, world_size)

    for message in FOREIGN_WARNINGS:
        warnings.filterwarnings("ignore", message)

    from qwen2_ascend import runtime as runtimes

    runtime = runtimes.start(
        None if settings.runtime.device == "auto" else settings.runtime.device,
        mindspeed=settings.runtime.mindspeed,
        timeout_seconds=60 * settings.parallel.distributed_timeout_minutes,
    )
    say = _say if runtime.rank == 0 else _say_nothing
    say(_headline(settings, runtime, start.config))
    if settings.runtime.deterministic:
        runtime.set_deterministic()
    runtimes.initialize_model_parallel(settings.layout(), start.config.num_layers)
    runtime.seed_all(settings.runtime.seed)

    from qwen2_ascend.training.checkpointing import resume

    run = build_run(settings, start, runtime, say)
    identity = checkpoint_identity(settings, start)
    if start.saved is not None:
        for note in resume(run, start.saved, identity, settings.checkpoint):
            say(note)
        say(f"resumed {start.saved.folder} at iteration {run.progress.iteration}")
        if run.progress.iteration >= run.train_iters:
            say(f"nothing is left to do: the run ends at iteration {run.train_iters}")
    _train(run, start.config, identity, say)
    runtime.close()


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run begins."""

    settings: PretrainSettings
    """With what the checkpoint settles filled in."""
    config: Qwen2Config
    source: Source | None
    """The weights, or None for random ones."""
    saved: SavedRun | None
    """The training state, where one is resumed."""


def find_start(settings: PretrainSettings) -> Start:
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


def _headline(settings: PretrainSettings, runtime: Runtime, config: Qwen2Config) -> str:
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


def build_run(
    settings: PretrainSettings, start: Start, runtime: Runtime, say: Callable[[str], None]
) -> TrainingRun:
    """Model with its weights, optimizer, schedule and data, at iteration 0.

    `runtime.initialize_model_parallel` has built the process groups of `settings.layout()`.

    Raises:
        UserError: weights or data do not fit the model.
    """
    from megatron.core import parallel_state

    from qwen2_ascend.checkpoint.load import load_checkpoint_weights
    from qwen2_ascend.model.build import build_model
    from qwen2_ascend.training.loop import Progress, TrainingRun, wrap_chunks
    from qwen2_ascend.training.optimizer import build_optimizer
    from qwen2_ascend.training.schedule import build_schedule

    parallel, recompute = settings.parallel, settings.recompute
    layout, padded = settings.layout(), settings.padded_vocab_size(start.config)
    chunks = build_model(
        start.config,
        layout,
        padded_vocab_size=padded,
        dtype=_dtype(settings),
        perform_initialization=start.source is None,
        sequence_parallel=parallel.sequence_parallel and layout.tp > 1,
        recompute_granularity=recompute.recompute_granularity,
        recompute_method=recompute.recompute_method,
        recompute_num_layers=recompute.recompute_num_layers,
        deterministic_mode=settings.runtime.deterministic,
    )
    if start.source is not None:
        load_checkpoint_weights(
            chunks,
            start.source,
            layout,
            padded_vocab_size=padded,
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            pp_stage=parallel_state.get_pipeline_model_parallel_rank(),
        )
        say(f"weights: {start.source.describe()}")
    else:
        say(f"weights: random, seed {settings.runtime.seed}")
    wrapped = wrap_chunks([chunk.to(runtime.device) for chunk in chunks], parallel)
    optimizer = build_optimizer(wrapped, settings)
    global_batch_size = settings.global_batch_size(runtime.world_size)
    train_iters = settings.train_iters(runtime.world_size)
    train_data, valid_data = _datasets(settings, start, train_iters, global_batch_size)
    return TrainingRun(
        settings=settings,
        runtime=runtime,
        chunks=wrapped,
        optimizer=optimizer,
        schedule=build_schedule(
            optimizer,
            settings.optimizer,
            train_iters=train_iters,
            global_batch_size=global_batch_size,
        ),
        train_data=train_data,
        valid_data=valid_data,
        progress=Progress(),
    )


def _datasets(
    settings: PretrainSettings, start: Start, train_iters: int, global_batch_size: int
) -> tuple[Any, Any]:
    """(training, validation); the latter None where its loss is not asked for."""
    data, seed = settings.data, settings.runtime.seed
    num_train, num_valid = train_iters * global_batch_size, data.eval_iters * global_batch_size
    if data.mock_data:
        from qwen2_ascend.training.mock_data import MockDataset

        sizes = (settings.batch.seq_length, start.config.vocab_size)
        valid = MockDataset(num_valid, *sizes, seed=seed + 1) if num_valid else None
        return MockDataset(num_train, *sizes, seed=seed), valid

    from qwen2_ascend.data.pretraining import build_pretraining_datasets

    datasets = build_pretraining_datasets(
        num_samples=(num_train, num_valid, 0),
        seq_length=settings.batch.seq_length,
        seed=seed,
        eod_token=_eod_token(settings, start),
        data_path=data.data_path or None,
        train_data_path=data.train_data_path or None,
        valid_data_path=data.valid_data_path or None,
        split=data.split,
        vocab_size=start.config.vocab_size,
        data_cache_path=data.data_cache_path,
        reset_position_ids=data.reset_position_ids,
        eod_mask_loss=data.eod_mask_loss,
    )
    return datasets.train, datasets.valid


def _eod_token(settings: PretrainSettings, start: Start) -> int:
    """What ends a document. Without --eod-mask-loss and --reset-position-ids nothing asks."""
    data = settings.data
    if data.eod_token is not None:
        return data.eod_token
    config = dict(_side_files(settings, start)).get(Path("config.json"), b"{}")
    token = json.loads(config).get("eos_token_id")
    token = token[0] if isinstance(token, list) and token else token
    if isinstance(token, int):
        return token
    if data.eod_mask_loss or data.reset_position_ids:
        raise UserError("give --eod-token: config.json has no eos_token_id.")
    return 0


def checkpoint_identity(settings: PretrainSettings, start: Start) -> CheckpointIdentity:
    """What checkpoints of this run say about its model."""
    from qwen2_ascend.training.checkpointing import CheckpointIdentity

    return CheckpointIdentity(
        config=start.config,
        layout=settings.layout(),
        padded_vocab_size=settings.padded_vocab_size(start.config),
        dtype=_dtype(settings),
        side_files=_side_files(settings, start),
    )


def _side_files(settings: PretrainSettings, start: Start) -> Mapping[Path, bytes]:
    """config.json, with the dtype that is trained in, and the tokenizer's files."""
    from qwen2_ascend.checkpoint.formats.hugging_face import side_files
    from qwen2_ascend.checkpoint.target import read_side_files

    dtype = _dtype(settings)
    if start.source is not None:
        return read_side_files(start.source.side_files, dtype)
    folder = Path(settings.model.config or "")
    if folder.is_file():
        folder = folder.parent
    if found := side_files(folder):
        return read_side_files(found, dtype)
    config = replace(start.config, dtype=dtype).to_hugging_face()
    return {Path("config.json"): (json.dumps(config, indent=2) + "\n").encode()}


def _dtype(settings: PretrainSettings) -> str:
    if settings.precision.bf16:
        return "bf16"
    return "fp16" if settings.precision.fp16 else "fp32"


def _train(
    run: TrainingRun, config: Qwen2Config, identity: CheckpointIdentity, say: Callable[[str], None]
) -> None:
    from qwen2_ascend.training.checkpointing import save_checkpoint
    from qwen2_ascend.training.loop import train
    from qwen2_ascend.training.signals import StopSignal

    settings = run.settings
    reporter = _reporter(run, config, identity.padded_vocab_size)

    def save() -> None:
        reporter.flush()
        reporter.say(f"saved {save_checkpoint(run, identity, settings.checkpoint)}")

    with StopSignal(settings.runtime.exit_signal_handler) as signal:
        try:
            reason = train(
                run,
                on_step=lambda result, seconds: reporter.step(_step(run, result, seconds)),
                on_validation=lambda loss: reporter.validation(run.progress.iteration, loss),
                save=save if settings.checkpoint.save else None,
                stop_wanted=lambda: signal.received,
            )
        finally:
            reporter.close()
    if reason:
        say(f"stopped after iteration {run.progress.iteration}: {reason}")


def _reporter(run: TrainingRun, config: Qwen2Config, padded_vocab_size: int) -> Reporter:
    from qwen2_ascend.training.logging import Reporter, train_flops

    settings = run.settings
    sequences, length = run.global_batch_size, settings.batch.seq_length
    return Reporter(
        train_iters=run.train_iters,
        first_iteration=run.progress.iteration,
        log_interval=settings.report.log_interval,
        tokens_per_step=sequences * length,
        flops_per_step=train_flops(
            config,
            num_sequences=sequences,
            seq_length=length,
            padded_vocab_size=padded_vocab_size,
        ),
        world_size=run.runtime.world_size,
        report_dir=settings.report.report_dir or settings.checkpoint.save,
        tensorboard_dir=settings.report.tensorboard_dir,
        silent=run.runtime.rank != 0,
    )


def _step(run: TrainingRun, result: Any, seconds: float) -> Any:
    from qwen2_ascend.training.logging import Step
    from qwen2_ascend.training.optimizer import loss_scale

    return Step(
        iteration=run.progress.iteration,
        consumed_samples=run.progress.consumed_samples,
        loss=result.loss,
        grad_norm=result.grad_norm,
        lr=result.lr,
        num_tokens=result.num_tokens,
        seconds=seconds,
        updated=result.updated,
        loss_scale=loss_scale(run.optimizer),
        peak_memory_bytes=result.peak_memory_bytes,
    )


def _ended(command: Callable[[], None]) -> int:
    """Calls `command`; its exit status, after saying what went wrong."""
    try:
        command()
    except UserError as error:
        _hand_to_torchrun(error)
        _complain(error.faults)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except Exception as error:
        _hand_to_torchrun(error)
        if type(error).__name__ == "NonFiniteError":
            _complain([str(error)])
        else:
            rank = os.environ.get("RANK", "0")
            print(f"rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return EXIT_FAILURE
    return 0


def _hand_to_torchrun(error: BaseException) -> None:
    """torchrun shows the first failing rank's error after its own lines."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _complain(faults: Sequence[str]) -> None:
    if os.environ.get("RANK", "0") == "0":
        for fault in faults:
            print(f"error: {fault}", file=sys.stderr, flush=True)


def _say(line: str) -> None:
    print(line, flush=True)


def _say_nothing(line: str) -> None:
    pass
