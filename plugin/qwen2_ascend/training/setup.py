"""What pretraining and fine-tuning share once the runtime has started: model, run, training."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from qwen2_ascend.checkpoint.formats.hugging_face import side_files
from qwen2_ascend.checkpoint.load import load_checkpoint_weights
from qwen2_ascend.checkpoint.readers.base import Source
from qwen2_ascend.checkpoint.target import read_side_files
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.machine import local_world_size
from qwen2_ascend.model.build import build_model
from qwen2_ascend.model.recompute import RecomputedOutputs
from qwen2_ascend.planning.flops import train_flops_per_token
from qwen2_ascend.planning.log import RUN_FILE
from qwen2_ascend.runtime import Runtime, agreement
from qwen2_ascend.telemetry import reporting
from qwen2_ascend.telemetry.energy import Energy
from qwen2_ascend.telemetry.instruments import Instruments
from qwen2_ascend.training.checkpointer import Checkpointer
from qwen2_ascend.training.checkpointing import CheckpointIdentity, megatron_checkpointer, resume
from qwen2_ascend.training.description import write_description
from qwen2_ascend.training.garbage import ManualCollection
from qwen2_ascend.training.length import RunLength
from qwen2_ascend.training.logging import Reporter, Step
from qwen2_ascend.training.loop import Progress, TrainingRun, train, validates_after, wrap_chunks
from qwen2_ascend.training.optimizer import build_optimizer
from qwen2_ascend.training.plan import RunPlan
from qwen2_ascend.training.planned import Expected, expected, layout_of_run
from qwen2_ascend.training.recompute_settings import RecomputeSettings
from qwen2_ascend.training.saved_run import SavedRun
from qwen2_ascend.training.schedule import build_schedule
from qwen2_ascend.training.settings import TrainingSettings
from qwen2_ascend.training.signals import StopSignal
from qwen2_ascend.training.start import undamaged

logger = logging.getLogger(__name__)


def build_chunks(plan: RunPlan, runtime: Runtime, **model_options: Any) -> list[Any]:
    """This rank's model chunks with their weights, on the device.

    `runtime.initialize_model_parallel` has built the process groups of `plan.layout`.

    Args:
        **model_options: of `build_model`, besides what the settings say.

    Raises:
        UserError: the weights do not fit the model.
    """
    settings, source = plan.settings, plan.source
    parallel, recompute = settings.parallel, settings.recompute
    recompute_method, recompute_num_layers = recompute.method_and_layers
    layout, padded = plan.layout, plan.padded_vocab_size
    chunks = build_model(
        plan.config,
        layout,
        padded_vocab_size=padded,
        dtype=settings.precision_name(),
        backend=settings.fusion.backend(runtime.name),
        plain=settings.fusion.plain,
        perform_initialization=source is None,
        sequence_parallel=parallel.sequence_parallel and layout.tp > 1,
        recompute_granularity=recompute.recompute_granularity,
        recompute_method=recompute_method,
        recompute_num_layers=recompute_num_layers,
        cross_entropy_chunk_size=recompute.cross_entropy_chunk_size,
        recompute_activations=_outputs(recompute, "activation_function"),
        recompute_norms=_outputs(recompute, "norm"),
        swaps_attention=recompute.swap_attention,
        use_ascend_mc2=settings.overlap.use_ascend_mc2,
        coc_parallel_num=settings.overlap.number_of_pieces,
        deterministic_mode=settings.runtime.deterministic,
        **model_options,
    )
    if source is not None:
        load = partial(
            load_checkpoint_weights,
            chunks,
            _with_padding(plan, source),
            layout,
            padded_vocab_size=padded,
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            pp_stage=parallel_state.get_pipeline_model_parallel_rank(),
        )
        undamaged(source.folder, load)
        logger.info(f"weights: {source.describe()}")
    else:
        logger.info(f"weights: random, seed {settings.runtime.seed}")
    return [chunk.to(runtime.device) for chunk in chunks]


def _outputs(recompute: RecomputeSettings, what: Any) -> RecomputedOutputs | None:
    chosen = recompute.single_outputs(what)
    return None if chosen is None else RecomputedOutputs(number=chosen[0], after=chosen[1])


def _with_padding(plan: RunPlan, source: Source) -> Source:
    """The weights; of a run that goes on, the padding's rows too, which were trained as the others.

    Elsewhere padding is zero: other tools leave anything in those rows.
    """
    was = getattr(plan.saved, "padded_vocab_size", None)
    if was != plan.padded_vocab_size:
        return source
    return replace(source, config=replace(source.config, vocab_size=was))


def build_run(
    settings: TrainingSettings,
    runtime: Runtime,
    chunks: Sequence[Any],
    *,
    train_data: Any,
    valid_data: Any = None,
    length: RunLength | None = None,
) -> TrainingRun:
    """Data parallelism, optimizer and schedule around `chunks`, at iteration 0.

    Args:
        length: of a run that is resumed; by default that of one which begins.
    """
    length = length or settings.length(runtime.world_size)
    wrapped = wrap_chunks(
        chunks, settings.parallel, grad_reduce_in_fp32=not settings.precision.o2_gradient
    )
    optimizer = build_optimizer(wrapped, settings)
    return TrainingRun(
        settings=settings,
        runtime=runtime,
        chunks=wrapped,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, settings.optimizer, length),
        length=length,
        train_data=train_data,
        valid_data=valid_data,
        progress=Progress(),
    )


def resume_if_saved(run: TrainingRun, plan: RunPlan) -> None:
    """Goes on from `plan.saved`, if there is a training state of all weights.

    Raises:
        UserError: it is not of this model.
    """
    if not isinstance(plan.saved, SavedRun):
        return
    load = partial(resume, run, plan.saved, checkpoint_identity(plan), run.settings.checkpoint)
    notes = undamaged(plan.saved.folder, load)
    log_resumed(run, plan.saved.folder, notes)


def log_resumed(run: TrainingRun, folder: Path, notes: Sequence[str]) -> None:
    """Tells where the run goes on, what is not as it was, and whether anything is left to do."""
    for note in notes:
        logger.info(note)
    logger.info(f"resumed {folder} at iteration {run.progress.iteration}")
    if run.progress.iteration >= run.train_iters:
        logger.info(f"nothing is left to do: the run ends at iteration {run.train_iters}")


def checkpoint_identity(plan: RunPlan) -> CheckpointIdentity:
    """What checkpoints of this run say about its model."""
    return CheckpointIdentity(
        config=plan.config,
        layout=plan.layout.of_weights,
        padded_vocab_size=plan.padded_vocab_size,
        dtype=plan.settings.precision_name(),
        side_files=run_side_files(plan),
    )


def run_side_files(plan: RunPlan) -> Mapping[Path, bytes]:
    """config.json, with the dtype that is trained in, and the tokenizer's files.

    Where flags gave the model its YaRN scaling, config.json says it too.
    """
    files = _side_files(plan)
    path = Path("config.json")
    if plan.config.yarn is None or path not in files:
        return files
    raw = json.loads(files[path])
    if Qwen2Config.from_dict(raw).yarn == plan.config.yarn:
        return files
    text = json.dumps(plan.config.with_own_yarn(raw), indent=2, ensure_ascii=False)
    return {**files, path: f"{text}\n".encode()}


def _side_files(plan: RunPlan) -> Mapping[Path, bytes]:
    dtype = plan.settings.precision_name()
    if plan.source is not None:
        return read_side_files(plan.source.side_files, dtype)
    folder = Path(plan.settings.model.config or "")
    if folder.is_file():
        folder = folder.parent
    if found := side_files(folder):
        return read_side_files(found, dtype)
    config = replace(plan.config, dtype=dtype).to_hugging_face()
    return {Path("config.json"): (json.dumps(config, indent=2) + "\n").encode()}


def train_and_report(
    run: TrainingRun,
    plan: RunPlan,
    checkpointer: Callable[[Callable[[str], None]], Checkpointer] | None = None,
) -> bool:
    """Trains to the end or until told to stop, with a log and checkpoints where they are asked for.

    Args:
        run: begins at its progress.
        plan: of the run.
        checkpointer: makes what writes checkpoints, given what prints a line; by default it writes
            all weights.

    Returns:
        Whether the run is complete.
    """
    with contextlib.ExitStack() as stack:
        opened = None
        if run.settings.checkpoint.save:
            make = checkpointer or partial(megatron_checkpointer, run, checkpoint_identity(plan))
            opened = stack.enter_context(contextlib.closing(make(lambda line: log(line))))
            opened.claim()
            if run.settings.has_own_disks:
                require_shared(run.settings.checkpoint.save)
        reporter = _reporter(run, plan)
        if reporter.report_dir:
            reporting.attempt(RUN_FILE, write_description, reporter.report_dir, plan, run)
        log = reporter.interrupt
        instruments = Instruments(run, reporter.tokens_per_step)
        return _train(run, reporter, instruments, opened)


def require_shared(save: Path) -> None:
    """Every rank looks for a file that rank 0 writes beside the folder of the checkpoints.

    Raises:
        UserError: on every rank, where one does not find it.
    """
    sign = save.absolute().parent / f".{save.name}.seen-by-all"
    agreement.made_by_first(sign.touch)
    agreement.raise_together(
        ()
        if sign.exists()
        else (
            f"--save {save}: what rank 0 writes there is not seen here; with --no-shared-storage "
            "only the data is on disks of the nodes' own, --save is on storage that all share.",
        )
    )
    agreement.made_by_first(partial(sign.unlink, missing_ok=True))


def _train(
    run: TrainingRun,
    reporter: Reporter,
    instruments: Instruments,
    checkpointer: Checkpointer | None,
) -> bool:
    def on_step(result: Any, seconds: float) -> None:
        reporter.step(_step(run, result, seconds, instruments.step(seconds)))
        will_evaluate = validates_after(run, result)
        garbage.after_step(run.progress.iteration, will_evaluate=will_evaluate)

    def on_validation(loss: float) -> None:
        reporter.validation(run.progress.iteration, loss)
        garbage.after_evaluation()

    stop = StopSignal(run.settings.runtime.exit_signal_handler)
    with stop as signal, ManualCollection(run.settings.runtime) as garbage:
        try:
            reason = train(
                run,
                on_step=on_step,
                on_validation=on_validation,
                checkpointer=checkpointer,
                stop_wanted=lambda: signal.received,
            )
            instruments.finish()
        finally:
            instruments.close()
            reporter.close()
    if reason:
        logger.info(f"stopped after iteration {run.progress.iteration}: {reason}")
    return reason is None


def _planned(run: TrainingRun, config: Qwen2Config) -> Expected | None:
    """What the planner predicts of the run.

    Rank 0 alone looks. There is no plan for a CPU or a simulated device, and none by DeepSpeed.
    """
    runtime = run.runtime
    if runtime.rank != 0 or runtime.simulated:
        return None
    per_node = local_world_size(runtime.world_size)

    def look() -> Expected | None:
        cut = layout_of_run(run.settings, config, runtime)
        return None if cut is None else expected(cut, runtime.device_name(), per_node)

    return reporting.attempt("the planner", look)


def _reporter(run: TrainingRun, plan: RunPlan) -> Reporter:
    settings = run.settings
    length = settings.batch.seq_length
    tokens = run.global_batch_size * run.rows_per_sample * length
    flops = tokens * train_flops_per_token(plan.config, length, plan.padded_vocab_size)
    return Reporter(
        train_iters=run.train_iters,
        first_iteration=run.progress.iteration,
        log_interval=settings.report.log_interval,
        tokens_per_step=tokens,
        flops_per_step=None if run.runtime.simulated else flops,
        world_size=run.runtime.world_size,
        report_dir=settings.report.report_dir or settings.checkpoint.save,
        tensorboard_dir=settings.report.tensorboard_dir,
        planned=_planned(run, plan.config),
        silent=run.runtime.rank != 0,
    )


def _step(run: TrainingRun, result: Any, seconds: float, energy: Energy | None) -> Any:
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
