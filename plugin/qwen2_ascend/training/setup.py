"""What pretraining and fine-tuning share, from checked settings to a run that trains."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qwen2_ascend import runtime as runtimes
from qwen2_ascend.checkpoint.formats.hugging_face import side_files
from qwen2_ascend.checkpoint.iteration import older_iterations
from qwen2_ascend.checkpoint.load import load_checkpoint_weights
from qwen2_ascend.checkpoint.manifest import check_iteration
from qwen2_ascend.checkpoint.target import read_side_files
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import DamagedError, Faults, UserError, raise_if
from qwen2_ascend.launching import silence_foreign_warnings
from qwen2_ascend.machine import local_world_size, rank
from qwen2_ascend.pasted_flags import pasted_notes
from qwen2_ascend.planning.flops import train_flops_per_token
from qwen2_ascend.planning.log import RUN_FILE
from qwen2_ascend.planning.parameters import num_parameters
from qwen2_ascend.runtime.megatron_compat import destroy_model_parallel
from qwen2_ascend.telemetry import reporting
from qwen2_ascend.telemetry.instruments import Instruments
from qwen2_ascend.telemetry.training_energy import require_power_source
from qwen2_ascend.training.description import write_description
from qwen2_ascend.training.garbage import ManualCollection
from qwen2_ascend.training.length import RunLength
from qwen2_ascend.training.logging import Reporter, Step
from qwen2_ascend.training.megatron_flags import training_flags
from qwen2_ascend.training.plan import Found, RunPlan, broadcast_plan, warn
from qwen2_ascend.training.planned import expected, layout_of_run, planned, refuse_without_devices
from qwen2_ascend.training.recompute_settings import RecomputeSettings
from qwen2_ascend.training.saved_run import SavedRun
from qwen2_ascend.training.schedule import build_schedule
from qwen2_ascend.training.settings import TrainingSettings
from qwen2_ascend.training.signals import StopSignal

if TYPE_CHECKING:
    from qwen2_ascend.checkpoint.readers.base import Source
    from qwen2_ascend.model.recompute import RecomputedOutputs
    from qwen2_ascend.parallel import ParallelLayout
    from qwen2_ascend.runtime import Runtime
    from qwen2_ascend.telemetry.energy import Energy
    from qwen2_ascend.training.checkpointer import Checkpointer
    from qwen2_ascend.training.checkpointing import CheckpointIdentity
    from qwen2_ascend.training.loop import TrainingRun
    from qwen2_ascend.training.planned import Expected

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=TrainingSettings)
T = TypeVar("T")


def is_planned_only(
    settings: S,
    make: Callable[[S, Found | None], RunPlan[S]],
    check: Callable[[S, Qwen2Config, int, RunLength | None], None],
) -> bool:
    """Whether --plan asked for figures alone, which this prints, on rank 0.

    The arguments are those of `begin`.

    Raises:
        UserError: the command would not start on so many devices, or cannot be planned.
    """
    number = settings.report.plan
    if number is None:
        return False

    refuse_without_devices(settings)
    if rank() == 0:
        plan = make(settings, None)
        check(plan.settings, plan.config, number, None)
        print(planned(plan.settings, plan.config))
    return True


def begin(
    settings: S,
    make: Callable[[S, Found | None], RunPlan[S]],
    check: Callable[[S, Qwen2Config, int, RunLength | None], None],
    check_data: Callable[[S], None],
) -> tuple[RunPlan[S], Runtime]:
    """Plans the run on rank 0, compares it on all ranks, and joins them.

    Args:
        settings: all flags.
        make: opens what they name, as `make_plan` does.
        check: the rules between them, of a model, a number of ranks and where the run is.
        check_data: what can be said of the data before there is a process group.

    Raises:
        UserError: settings, data or checkpoint are not as they have to be; every fault at once,
            and those that rank 0 finds before any rank waits for another.
    """
    own = None
    if rank() == 0:
        faults = Faults()
        own = faults.collect(partial(_checked_plan, settings, make, check))
        faults.collect(partial(check_data, settings))
        raise_if(faults)
    timeout_seconds = 60 * settings.parallel.distributed_timeout_minutes
    plan = broadcast_plan(partial(make, settings), own, timeout_seconds)
    runtime = start_runtime(plan)
    if plan.saved is not None and not isinstance(plan.saved, SavedRun):
        # DeepSpeed and peft read whole files, and check nothing
        share = {"share": runtime.rank, "num_shares": runtime.world_size}
        undamaged(plan.saved.folder, partial(check_iteration, plan.saved.folder, **share))
    return plan, runtime


def _checked_plan(
    settings: S,
    make: Callable[[S, Found | None], RunPlan[S]],
    check: Callable[[S, Qwen2Config, int, RunLength | None], None],
) -> RunPlan[S]:
    plan = make(settings, None)
    made = RunLength(train_iters=0, global_batch_size=1, **plan.made())
    check(plan.settings, plan.config, plan.world_size, made)
    return plan


def undamaged(folder: Path, load: Callable[[], T]) -> T:
    """What `load` gives, once no rank has found anything damaged; every rank calls it.

    Args:
        folder: of the checkpoint.
        load: reads some of it; it must not wait for other ranks.

    Raises:
        DamagedError: on every rank.
    """
    from qwen2_ascend.runtime import agreement

    faults: Sequence[str] = ()
    loaded: Any = None
    try:
        loaded = load()
    except DamagedError as error:
        faults = error.faults
    try:
        agreement.raise_together(faults)
    except UserError as error:
        damaged = DamagedError(error.faults)
        damaged.folder = folder
        raise damaged from None
    return loaded


def from_sound_checkpoint(settings: S, run: Callable[[S], None]) -> None:
    """Runs, and where the checkpoint to go on from proves damaged, runs from the one before.

    Args:
        run: does everything; it raises DamagedError on all ranks or on none.

    Raises:
        DamagedError: there is no other one.
    """
    while True:
        try:
            return run(settings)
        except DamagedError as error:
            older = _older(settings, error)
        settings = replace(settings, model=replace(settings.model, load=older))


def _older(settings: TrainingSettings, error: DamagedError) -> Path:
    """The sound checkpoint before a damaged one, as rank 0 finds it.

    Raises:
        DamagedError: there is none.
    """
    from qwen2_ascend.runtime import agreement

    if error.folder is None or settings.model.load is None:
        raise error
    damaged = error.folder
    names = agreement.made_by_first(lambda: [path.name for path in older_iterations(damaged)])
    if rank() == 0:
        warn(damaged, error)
    if not names:
        raise error
    error.__traceback__ = None  # whose frames hold the model
    destroy_model_parallel()
    return damaged.parent / names[0]


def _headline(plan: RunPlan, runtime: Runtime) -> str:
    settings, parallel, layout = plan.settings, plan.settings.parallel, plan.layout
    tp, cp = layout.tp, f" CP{layout.cp}" if layout.cp > 1 else ""
    dp = settings.data_parallel_size(runtime.world_size)
    words = [f"TP{tp} PP{layout.pp}{cp} DP{dp}"]
    if layout.cp > 1:
        words.append(layout.context_parallel_algo)
    if per_chunk := parallel.num_layers_per_virtual_pipeline_stage:
        words.append(f"{per_chunk} layer(s) per virtual stage")
    if parallel.sequence_parallel and tp > 1:
        words.append("sequence parallel")
    if parallel.use_distributed_optimizer:
        words.append("distributed optimizer")
    words.append(settings.precision_name())
    words.append(f"{num_parameters(plan.config):,} parameters")
    return f"{runtime.describe()}, {', '.join(words)}"


def start_runtime(plan: RunPlan) -> Runtime:
    """The device, the process groups of the layout and the seeds.

    Raises:
        UserError: the device or the number of processes does not do.
    """
    settings = plan.settings
    silence_foreign_warnings()
    runtime = runtimes.start(
        None if settings.runtime.device == "auto" else settings.runtime.device,
        mindspeed=settings.runtime.wants_mindspeed(),
        timeout_seconds=60 * settings.parallel.distributed_timeout_minutes,
        deterministic=settings.runtime.deterministic,
        megatron_arguments=megatron_arguments(settings),
    )
    faults = settings.fusion.faults(runtime.name)
    faults += settings.overlap.device_faults(settings, runtime.name)
    faults += _packed_blocks_faults(settings, plan.layout, runtime.name)
    raise_if(faults)
    if settings.report.log_energy:
        require_power_source(runtime)
    logger.info(_headline(plan, runtime))
    logger.info(settings.fusion.describe(runtime.name))
    pasted = pasted_notes(settings.pasted, training_flags(type(settings)))
    overlap = settings.overlap.notes(settings.parallel.tensor_model_parallel_size)
    precision = settings.precision.notes(settings.optimizer)
    for note in (*overlap, *precision, *pasted, *runtime.notes):
        logger.info(note)
    runtimes.initialize_model_parallel(plan.layout, plan.config.num_layers)
    runtime.seed_all(settings.runtime.seed)
    return runtime


def _packed_blocks_faults(
    settings: TrainingSettings, layout: ParallelLayout, device: str
) -> list[str]:
    """What an npu's attention lacks for documents that ranks share."""
    in_blocks = layout.cp > 1 and layout.context_parallel_algo != "ulysses_cp_algo"
    if not (settings.keeps_apart and in_blocks and "attention" in settings.fusion.fused(device)):
        return []
    from qwen2_ascend.ops.npu import packed_blocks_faults

    return packed_blocks_faults()


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


def build_chunks(plan: RunPlan, runtime: Runtime, **model_options: Any) -> list[Any]:
    """This rank's model chunks with their weights, on the device.

    `runtime.initialize_model_parallel` has built the process groups of `plan.layout`.

    Args:
        **model_options: of `build_model`, besides what the settings say.

    Raises:
        UserError: the weights do not fit the model.
    """
    from megatron.core import parallel_state

    from qwen2_ascend.model.build import build_model

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
    from qwen2_ascend.model.recompute import RecomputedOutputs

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
    from qwen2_ascend.training.loop import Progress, TrainingRun, wrap_chunks
    from qwen2_ascend.training.optimizer import build_optimizer

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
    from qwen2_ascend.training.checkpointing import resume

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
    from qwen2_ascend.training.checkpointing import CheckpointIdentity

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
    from qwen2_ascend.training.checkpointing import megatron_checkpointer

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
    from qwen2_ascend.runtime import agreement

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
    from qwen2_ascend.training.loop import is_due, train

    def on_step(result: Any, seconds: float) -> None:
        reporter.step(_step(run, result, seconds, instruments.step(seconds)))
        is_next = is_due(run.progress.iteration, run.settings.data.eval_interval)
        will_evaluate = is_next and run.valid_data is not None
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
