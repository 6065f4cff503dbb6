"""--plan N: what the planner says of this very command on so many devices; nothing is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.planning import report, search
from qwen2_ascend.planning.devices import Device, find_device
from qwen2_ascend.planning.job import Cut, Job, Recompute
from qwen2_ascend.training.settings import RecomputeSettings, TrainingSettings


def planned(settings: TrainingSettings, config: Qwen2Config) -> str:
    """Memory, traffic and time of the settings' layout, and the fewest devices it would fit on.

    Args:
        settings: which the launcher has found to be right on `--plan` devices.
        config: the model's.

    Raises:
        UserError: the planner cannot plan it.
    """
    number, device = settings.report.plan, find_device(settings.report.plan_device)
    assert number is not None
    raise_if(_not_planned(settings))
    cut = as_cut(settings, config, number, device)
    machine = search.Machine(
        device=device, num_devices=number, devices_per_node=device.devices_per_node
    )
    result = report.Result(
        settings.model.config or str(settings.model.load or settings.model.pretrained_checkpoint),
        cut.job,
        machine,
        [search.plan_of(cut, machine)],
        search.fewest_devices(cut.job, machine),
    )
    return report.text(result, top=1, commands=0)


def as_cut(
    settings: TrainingSettings, config: Qwen2Config, num_devices: int, device: Device
) -> Cut:
    """The planner's view of a run's settings."""
    parallel, recompute = settings.parallel, settings.recompute
    layout = settings.layout()
    lora = getattr(settings, "lora", None)
    kind: Recompute = recompute.recompute_granularity or "none"
    cut = Cut(
        job=Job(
            config=config,
            seq_length=settings.batch.seq_length,
            global_batch_size=settings.global_batch_size(num_devices),
            dtype=settings.precision_name(),
            backend=device.backend,
            keeps_scores=settings.fusion.attention_backend in ("unfused", "local"),
            cross_entropy_chunk_size=recompute.cross_entropy_chunk_size,
            lora_rank=lora.lora_r if lora is not None and lora.is_on else None,
        ),
        tp=layout.tp,
        pp=layout.pp,
        dp=settings.data_parallel_size(num_devices),
        layers_per_chunk=layout.num_layers_per_virtual_pipeline_stage,
        num_layer_list=layout.num_layer_list,
        sequence_parallel=parallel.sequence_parallel and layout.tp > 1,
        distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        recompute=kind,
        recompute_activation_function=recompute.recompute_activation_function,
        recompute_norm=recompute.recompute_norm,
        reuse_fp32_param=settings.precision.reuse_fp32_param,
        micro_batch_size=settings.batch.micro_batch_size,
        mc2=settings.overlap.is_on and layout.tp > 1,
    )
    return replace(cut, recomputed_layers=_recomputed_layers(recompute, cut.num_chunks))


def _recomputed_layers(recompute: RecomputeSettings, num_chunks: int) -> int | None:
    """Whole layers of a stage, where a block of each chunk is recomputed; None is all."""
    method, number = recompute.method_and_layers
    return number * num_chunks if method == "block" and number is not None else None


def _not_planned(settings: Any) -> list[str]:
    """What the planner does not know, one sentence each."""
    tuning, recompute = getattr(settings, "tuning", None), settings.recompute
    unknown = {
        "--stage dpo": tuning is not None and tuning.stage == "dpo",
        "--swap-attention": recompute.swap_attention,
        "--recompute-activation-function-num-layers": (
            recompute.recompute_activation_function_num_layers is not None
        ),
        "--recompute-norm-num-layers": recompute.recompute_norm_num_layers is not None,
        "--lora-load": getattr(settings, "lora", None) and settings.lora.lora_load is not None,
    }
    return [
        f"--plan: the planner does not know {name}; leave it out to see the rest."
        for name, is_given in unknown.items()
        if is_given
    ]


def refuse_without_devices(settings: TrainingSettings) -> None:
    """Raises UserError where --plan names no number of devices, or --plan-device no device."""
    if settings.report.plan is not None and settings.report.plan < 1:
        raise UserError(f"--plan {settings.report.plan} must be at least 1.")
    find_device(settings.report.plan_device)
