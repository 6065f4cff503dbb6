"""`qwen2-ascend plan` and tools/plan_parallelism.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.planning import report, search
from qwen2_ascend.planning.devices import GB, TERA, Device, Rates, find_device
from qwen2_ascend.planning.job import Cut, Job


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Which layouts of a training run fit into memory, and which may be fastest.

    qwen2-ascend plan --model 72B --device 910B --num-devices 16

    Memory is computed tensor by tensor, as tests measure it on CPU ranks. Times are predicted by a
    roofline from public figures of the device; nothing ran on it. Pretraining, fine-tuning of all
    weights and LoRA are planned; uneven stages, DPO and DeepSpeed's ZeRO are not.
    """

    model: Annotated[str, tyro.conf.arg(metavar="DIR|SIZE")]
    """A Hugging Face folder, a config.json, or a published size (0.5B, 1.5B, 3B, 7B, 14B, 32B,
    72B)."""
    num_devices: int
    """Devices; of an Ascend 910C each die is one."""
    device: str = "910B"
    """910B1, 910B2, 910B3, 910B4 (32 GB), 910C, A100, A100-40GB, H100, B200, CPU; 910B is taken as
    910B2, and said so. npu-smi names the bin of yours."""
    devices_per_node: int | None = None
    """Devices with fast links to each other; by default the device's usual."""
    seq_length: int = 4096
    """Tokens in a sequence."""
    global_batch_size: int | None = None
    """Sequences per optimizer step; by default 256, or one per device where there are more."""
    micro_batch_size: int | None = None
    """Sequences that go through a rank at once; by default 1, 2, 4 and 8 are tried."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Of weights and activations."""
    attention_backend: Literal["auto", "unfused"] = "auto"
    """unfused keeps s x s scores per head; auto is a kernel that does not."""
    cross_entropy_chunk_size: int | None = None
    """Tokens whose logits exist at once; by default all."""
    lora_r: int | None = None
    """Fine-tune LoRA adapters of this rank on all linear layers, instead of all weights."""
    tensor_model_parallel_size: int | None = None
    """Only layouts with this; by default all are tried, as with the next five."""
    pipeline_model_parallel_size: int | None = None
    """Only layouts with this."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Only layouts with this."""
    sequence_parallel: Literal["yes", "no"] | None = None
    """Only layouts with it, or without."""
    use_distributed_optimizer: Literal["yes", "no"] | None = None
    """Only layouts with it, or without."""
    recompute_granularity: Literal["none", "selective", "full"] | None = None
    """Only layouts with this; full is by single layers."""
    memory_gb: float | None = None
    """Memory of a device, instead of the table's."""
    memory_fraction: float = 0.9
    """Share of it that tensors may take."""
    peak_tflops: float | None = None
    """Peak of a device in bf16, instead of the table's."""
    memory_bandwidth_gb: float | None = None
    """GB/s of a device's own memory, instead of the table's."""
    node_bandwidth_gb: float | None = None
    """GB/s to the other devices of a node, one direction, instead of the table's."""
    network_bandwidth_gb: float | None = None
    """GB/s to other nodes, one direction, instead of the table's."""
    efficiency: float | None = None
    """Share of the peak that matrix products reach; by default as fitted to published runs."""
    bandwidth_efficiency: float | None = None
    """Share of the links' bandwidths that is reached; by default as fitted."""
    top: int = 10
    """Layouts to show: the best settings of each TP, PP, VPP and DP."""
    commands: int = 1
    """Launch commands to show."""
    json: Path | None = None
    """Write all layouts there."""
    picture: Path | None = None
    """Write a PNG of the memory per rank there; needs matplotlib."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parses `argv` and prints what fits."""
    run(tyro.cli(PlanOptions, args=argv, description=PlanOptions.__doc__))


def run(options: PlanOptions) -> None:
    """Plans and reports.

    Raises:
        UserError: options that cannot be.
    """
    result = plan(options)
    if (name := find_device(options.device).name) not in options.device.upper():
        print(
            f"--device {options.device} is taken as {name}; name the bin of your cards, which "
            "npu-smi info shows: 910B1, 910B2, 910B3 or 910B4 (32 GB)."
        )
    print(report.text(result, top=options.top, commands=options.commands))
    if options.json:
        report.write_json(result, options.json)
        print(f"\nwrote {options.json}")
    if options.picture:
        from qwen2_ascend.planning.picture import draw

        draw(result, options.picture)
        print(f"\nwrote {options.picture}")


def plan(options: PlanOptions) -> report.Result:
    """What `qwen2-ascend plan` prints, as data: all layouts, the best first.

    Raises:
        UserError: options that cannot be.
    """
    raise_if(_faults(options))
    job, machine = _job(options), _machine(options)
    sizes = search.MICRO_BATCH_SIZES
    if options.micro_batch_size is not None:
        sizes = (options.micro_batch_size,)
    plans = search.find_plans(job, machine, micro_batch_sizes=sizes)
    plans = [plan for plan in plans if _is_wanted(plan.cut, options)]
    if not plans:
        raise UserError(
            f"{options.num_devices} devices and --global-batch-size {job.global_batch_size} have "
            "no valid layout of the kind asked for; leave out some of the flags that name it."
        )
    fewest = search.fewest_devices(job, machine)
    return report.Result(options.model, job, machine, plans, fewest)


def _is_wanted(cut: Cut, options: PlanOptions) -> bool:
    """Whether it is as the options that name a layout say."""
    yes_or_no = {True: "yes", False: "no"}
    pairs = (
        (cut.tp, options.tensor_model_parallel_size),
        (cut.pp, options.pipeline_model_parallel_size),
        (cut.layers_per_chunk, options.num_layers_per_virtual_pipeline_stage),
        (yes_or_no[cut.sequence_parallel], options.sequence_parallel),
        (yes_or_no[cut.distributed_optimizer], options.use_distributed_optimizer),
        (cut.recompute, options.recompute_granularity),
    )
    return all(asked is None or asked == has for has, asked in pairs)


def _job(options: PlanOptions) -> Job:
    path = Path(options.model)
    config = (
        Qwen2Config.from_pretrained(path) if path.exists() else Qwen2Config.named(options.model)
    )
    return Job(
        config=config,
        seq_length=options.seq_length,
        global_batch_size=options.global_batch_size or max(256, options.num_devices),
        dtype=options.dtype,
        backend=find_device(options.device).backend,
        keeps_scores=options.attention_backend == "unfused",
        cross_entropy_chunk_size=options.cross_entropy_chunk_size,
        lora_rank=options.lora_r,
    )


def _machine(options: PlanOptions) -> search.Machine:
    device = _device(options)
    return search.Machine(
        device=device,
        num_devices=options.num_devices,
        devices_per_node=options.devices_per_node or device.devices_per_node,
        memory_fraction=options.memory_fraction,
        rates=_rates(options, device),
    )


def _rates(options: PlanOptions, device: Device) -> Rates:
    given = {"products": options.efficiency, "links": options.bandwidth_efficiency}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return device.rates
    source = f"{' and '.join(given)} as given; else {device.rates.source}"
    return replace(device.rates, **given, source=source)


def _device(options: PlanOptions) -> Device:
    """The table's, with what the options say otherwise."""
    given = {
        "memory": (options.memory_gb, GB),
        "peak_flops": (options.peak_tflops, TERA),
        "memory_bandwidth": (options.memory_bandwidth_gb, GB),
        "node_bandwidth": (options.node_bandwidth_gb, GB),
        "network_bandwidth": (options.network_bandwidth_gb, GB),
    }
    device = find_device(options.device)
    changes = {name: value * unit for name, (value, unit) in given.items() if value is not None}
    if not changes:
        return device
    source = f"{', '.join(changes)} as given; else {device.source}"
    assumed = tuple(name for name in device.assumed if name not in changes)
    return replace(device, **changes, source=source, assumed=assumed)


def _faults(options: PlanOptions) -> list[str]:
    at_least_one = {
        "--num-devices": options.num_devices,
        "--devices-per-node": options.devices_per_node,
        "--micro-batch-size": options.micro_batch_size,
        "--global-batch-size": options.global_batch_size,
        "--top": options.top,
    }
    shares = {
        "--memory-fraction": options.memory_fraction,
        "--efficiency": options.efficiency,
        "--bandwidth-efficiency": options.bandwidth_efficiency,
    }
    above_zero = {
        "--memory-gb": options.memory_gb,
        "--peak-tflops": options.peak_tflops,
        "--memory-bandwidth-gb": options.memory_bandwidth_gb,
        "--node-bandwidth-gb": options.node_bandwidth_gb,
        "--network-bandwidth-gb": options.network_bandwidth_gb,
    }
    faults = [
        f"{k} {v!r} is not a whole number."
        for k, v in at_least_one.items()
        if v is not None and not isinstance(v, int)
    ]
    if faults:
        return faults
    faults = [
        f"{k} {v} must be at least 1." for k, v in at_least_one.items() if v is not None and v < 1
    ]
    faults += [
        f"{k} {v} must be above 0 and at most 1."
        for k, v in shares.items()
        if v is not None and not 0 < v <= 1
    ]
    faults += [
        f"{k} {v} must be above zero." for k, v in above_zero.items() if v is not None and not v > 0
    ]
    if options.commands < 0:
        faults.append(f"--commands {options.commands} must not be negative.")
    try:
        find_device(options.device)
    except UserError as error:
        faults += error.faults
    for flag, path in {"--json": options.json, "--picture": options.picture}.items():
        if path is not None and path.is_dir():
            faults.append(f"{flag} {path} is a folder; name a file in it.")
        elif path is not None and not path.absolute().parent.is_dir():
            faults.append(f"{flag} {path}: there is no folder {path.absolute().parent}; make it.")
    return faults
