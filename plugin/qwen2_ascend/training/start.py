"""From a checked plan to a started runtime: with torch, and before megatron-core is imported.

megatron-core may be imported only once the runtime has started, which redirects what it finds then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from qwen2_ascend import runtime as runtimes
from qwen2_ascend.checkpoint.iteration import older_iterations
from qwen2_ascend.checkpoint.manifest import check_iteration
from qwen2_ascend.errors import DamagedError, Faults, UserError, raise_if
from qwen2_ascend.launching import silence_foreign_warnings
from qwen2_ascend.machine import rank
from qwen2_ascend.parallel import ParallelLayout
from qwen2_ascend.pasted_flags import pasted_notes
from qwen2_ascend.planning.parameters import num_parameters
from qwen2_ascend.runtime import Runtime, agreement, meeting
from qwen2_ascend.runtime.megatron_compat import destroy_model_parallel
from qwen2_ascend.telemetry.training_energy import require_power_source
from qwen2_ascend.training.megatron_flags import training_flags
from qwen2_ascend.training.plan import Found, RunPlan, warn
from qwen2_ascend.training.saved_run import SavedRun
from qwen2_ascend.training.settings import TrainingSettings, megatron_arguments

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=TrainingSettings)
T = TypeVar("T")


def begin(
    settings: S, make: Callable[[S, Found | None], RunPlan[S]], own: RunPlan[S] | None
) -> tuple[RunPlan[S], Runtime]:
    """Compares the plan of a run on all ranks, and joins them.

    Args:
        settings: all flags.
        make: opens what they name, as `make_plan` does.
        own: what it has made, and `launch` checked, on rank 0.

    Raises:
        UserError: the plan is not the same on all ranks, or device or checkpoint are not as they
            have to be.
    """
    timeout_seconds = 60 * settings.parallel.distributed_timeout_minutes
    plan = broadcast_plan(partial(make, settings), own, timeout_seconds)
    runtime = start_runtime(plan)
    if plan.saved is not None and not isinstance(plan.saved, SavedRun):
        # DeepSpeed and peft read whole files, and check nothing
        share = {"share": runtime.rank, "num_shares": runtime.world_size}
        undamaged(plan.saved.folder, partial(check_iteration, plan.saved.folder, **share))
    return plan, runtime


def broadcast_plan(
    make: Callable[[Found | None], RunPlan[S]], own: RunPlan[S] | None, timeout_seconds: float
) -> RunPlan[S]:
    """This rank's plan, of what rank 0 found, once it is known to be the same on all ranks.

    Args:
        make: makes a rank's plan of what rank 0 found.
        own: rank 0's plan, which is made already.
        timeout_seconds: how long a rank waits for the others.

    Raises:
        UserError: on every rank, with what is not the same on all of them.
    """
    meeting.meet(timeout_seconds)
    found, facts = agreement.broadcast_from_first((own.found, own.facts()) if own else (None, {}))
    faults = Faults()
    plan = own or faults.collect(partial(make, found))
    if plan is not None:
        mine = plan.facts()
        faults += [
            f"{name}: {mine.get(name)}, and {facts.get(name)} on rank 0; start all ranks with "
            "the same flags and the same files."
            for name in dict.fromkeys((*facts, *mine))
            if mine.get(name) != facts.get(name)
        ]
    agreement.raise_together(faults)
    assert plan is not None
    return plan


def undamaged(folder: Path, load: Callable[[], T]) -> T:
    """What `load` gives, once no rank has found anything damaged; every rank calls it.

    Args:
        folder: of the checkpoint.
        load: reads some of it; it must not wait for other ranks.

    Raises:
        DamagedError: on every rank.
    """
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


def older(settings: TrainingSettings, error: DamagedError) -> Path:
    """The sound checkpoint before a damaged one, as rank 0 finds it.

    Raises:
        DamagedError: there is none.
    """
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


def start_runtime(plan: RunPlan) -> Runtime:
    """The device, the process groups of the layout and the seeds.

    Raises:
        UserError: the device or the number of processes does not do.
    """
    settings = plan.settings
    silence_foreign_warnings()
    runtime = start_device(settings)
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
    dtype = runtime.dtype_notes(settings.precision_name())
    for note in (*dtype, *overlap, *precision, *settings.data_notes, *pasted, *runtime.notes):
        logger.info(note)
    runtimes.initialize_model_parallel(plan.layout, plan.config.num_layers)
    runtime.seed_all(settings.runtime.seed)
    return runtime


def start_device(settings: TrainingSettings) -> Runtime:
    """The device, and the process group of all ranks.

    Raises:
        UserError: as `runtime.start`.
    """
    return runtimes.start(
        None if settings.runtime.device == "auto" else settings.runtime.device,
        mindspeed=settings.runtime.wants_mindspeed(),
        timeout_seconds=60 * settings.parallel.distributed_timeout_minutes,
        deterministic=settings.runtime.deterministic,
        megatron_arguments=megatron_arguments(settings),
    )


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


def _packed_blocks_faults(
    settings: TrainingSettings, layout: ParallelLayout, device: str
) -> list[str]:
    """What an npu's attention lacks for documents that ranks share."""
    in_blocks = layout.cp > 1 and layout.context_parallel_algo != "ulysses_cp_algo"
    if not (settings.keeps_apart and in_blocks and "attention" in settings.fusion.fused(device)):
        return []
    from qwen2_ascend.ops.npu import packed_blocks_faults

    return packed_blocks_faults()
