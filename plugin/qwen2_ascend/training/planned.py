"""What the planner says of a run: by --plan N instead of it, and in its log beside what it took."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.planning import report, search
from qwen2_ascend.planning.devices import device_called, find_device
from qwen2_ascend.planning.job import Job, Recompute, RunLayout
from qwen2_ascend.planning.memory import HCCL_BYTES, communicators, fullest_stage
from qwen2_ascend.planning.roofline import step_time
from qwen2_ascend.training.recompute_settings import RecomputeSettings
from qwen2_ascend.training.settings import TrainingSettings


def planned(settings: TrainingSettings, config: Qwen2Config) -> str:
    """Memory, traffic and time of the settings' layout, and the fewest devices it would fit on.

    The launcher has found the settings to be right on `--plan` devices.

    Raises:
        UserError: the planner cannot plan it.
    """
    number, device = settings.report.plan, find_device(settings.report.plan_device, "--plan-device")
    assert number is not None
    raise_if(
        f"--plan: the planner does not know {name}; leave it out to see the rest."
        for name in settings.unplanned
    )
    cut = as_run_layout(settings, config, number, device.backend)
    machine = search.Machine(
        device=device, num_devices=number, devices_per_node=device.devices_per_node
    )
    result = report.Result(
        settings.model.config or str(settings.model.load or settings.model.pretrained_checkpoint),
        cut.job,
        machine,
        [search.plan_of(cut, machine)],
        search.fewest_devices(cut.job, machine, search.Choices(zero=cut.zero)),
    )
    method, layers = settings.recompute.method_and_layers
    note = report.uniform_note(layers) if method == "uniform" else ""
    return note + report.text(result, top=1, commands=0)


class Expected(NamedTuple):
    """What the planner predicts of a step of a run."""

    device: str
    seconds: float
    memory: int
    """Bytes that torch allocates on the fullest device at most; HCCL's own are not among them."""


def expected(cut: RunLayout, device_name: str, devices_per_node: int) -> Expected | None:
    """What the planner predicts of a run; None on a device that it does not know."""
    device = device_called(device_name)
    if device is None or device.backend == "cpu":
        return None
    time = step_time(cut, device, device.rates, devices_per_node=devices_per_node)
    memory = fullest_stage(cut)[1].total
    if device.backend == "npu":
        memory -= communicators(cut) * HCCL_BYTES
    return Expected(device.name, time.total, memory)


def against_the_plan(
    planned: Expected, steps: range, seconds: float, peak_memory_bytes: int | None
) -> str:
    """The line of a log that says whether the speed and the memory are as they should be.

    Args:
        planned: by the planner.
        steps: the steps that were measured.
        seconds: the seconds of one of them.
        peak_memory_bytes: the fullest device's peak; None where nobody measured it.
    """
    measured = f"{seconds:.3f} s/step ({seconds / planned.seconds - 1:+.0%})"
    foreseen = f"{planned.seconds:.3f} s/step"
    if peak_memory_bytes is not None:
        more = peak_memory_bytes / planned.memory - 1
        measured += f", {peak_memory_bytes / 2**30:.2f} GiB ({more:+.0%})"
        foreseen += f", {planned.memory / 2**30:.2f} GiB"
    numbers = f"steps {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"
    return (
        f"{numbers} measured: {measured} | planned for {planned.device}: "
        f"{foreseen} (docs/planning.md)"
    )


def as_run_layout(
    settings: TrainingSettings, config: Qwen2Config, num_devices: int, backend: str
) -> RunLayout:
    """The planner's view of a run on so many devices, with the operators of cpu, cuda or npu."""
    parallel, recompute = settings.parallel, settings.recompute
    layout = settings.layout()
    kind: Recompute = recompute.recompute_granularity or "none"
    cut = RunLayout(
        job=Job(
            config=config,
            seq_length=settings.batch.seq_length,
            global_batch_size=settings.global_batch_size(num_devices),
            dtype=settings.precision_name(),
            backend=backend,
            keeps_scores=settings.fusion.attention_backend in ("unfused", "local"),
            cross_entropy_chunk_size=recompute.cross_entropy_chunk_size,
            lora_rank=settings.lora_rank,
            pairs=settings.trains_pairs,
        ),
        tp=layout.tp,
        pp=layout.pp,
        cp=layout.cp,
        zero=settings.planned_zero(num_devices, backend),
        gathers_keys=layout.cp > 1 and layout.context_parallel_algo == "kvallgather_cp_algo",
        ulysses=layout.cp if layout.context_parallel_algo == "ulysses_cp_algo" else 1,
        dp=settings.data_parallel_size(num_devices),
        layers_per_chunk=layout.num_layers_per_virtual_pipeline_stage,
        num_layer_list=layout.num_layer_list,
        sequence_parallel=parallel.sequence_parallel and layout.tp > 1,
        distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        recompute=kind,
        recompute_activation_function=_single_outputs(recompute, "activation_function"),
        recompute_norm=_single_outputs(recompute, "norm"),
        swap_attention=recompute.swap_attention,
        reuse_fp32_param=settings.precision.reuse_fp32_param,
        o2_gradient=settings.precision.o2_gradient,
        o2_optimizer=settings.precision.o2_optimizer,
        micro_batch_size=settings.batch.micro_batch_size,
        mc2=settings.overlap.is_on and layout.tp > 1,
        coc_parallel_num=settings.overlap.number_of_pieces if layout.tp > 1 else 1,
        optimizer_offload_fraction=settings.optimizer.optimizer_offload_fraction
        if settings.optimizer.optimizer_cpu_offload
        else 0.0,
    )
    return replace(cut, recomputed_layers=_recomputed_layers(recompute, cut.num_chunks))


def layout_of_run(
    settings: TrainingSettings, config: Qwen2Config, runtime: Any
) -> RunLayout | None:
    """The planner's view of a run that begins; None where there is none.

    There is no view of a run by DeepSpeed, nor of what the planner does not know.
    """
    if settings.by_deepspeed or settings.unplanned:
        return None
    return as_run_layout(settings, config, runtime.world_size, runtime.name)


def _single_outputs(recompute: RecomputeSettings, what: Any) -> int:
    """Layers of a chunk of which one output is computed again."""
    chosen = recompute.single_outputs(what)
    return chosen[0] if chosen is not None else 0


def _recomputed_layers(recompute: RecomputeSettings, num_chunks: int) -> int | None:
    """Whole layers of a stage, where a block of each chunk is recomputed; None is all."""
    method, number = recompute.method_and_layers
    return number * num_chunks if method == "block" and number is not None else None


def refuse_without_devices(settings: TrainingSettings) -> None:
    """Raises UserError where --plan names no number of devices, or --plan-device no device."""
    if settings.report.plan is not None and settings.report.plan < 1:
        raise UserError(f"--plan {settings.report.plan} must be at least 1.")
    find_device(settings.report.plan_device, "--plan-device")
