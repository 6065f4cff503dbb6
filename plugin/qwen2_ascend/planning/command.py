"""`qwen2-ascend plan` and tools/plan_parallelism.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import tyro

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.planning import log, report, search
from qwen2_ascend.planning.devices import DEVICES, GB, TERA, Device, Rates, find_device
from qwen2_ascend.planning.job import ALL_LAYERS, Job, Zero

YesNo = Literal["yes", "no"]
DEFAULT_DEVICE = "910B"
MOST = 1e12
"""The most GB, GB/s or TFLOP/s; a device's figures beyond it are slips, or infinite."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Which layouts of a training run fit into memory, and which may be fastest.

    qwen2-ascend plan --model 72B --device 910B --num-devices 16

    Memory is computed tensor by tensor, as tests measure it on CPU ranks. Times are predicted by a
    roofline from public figures of the device; nothing ran on it. Flags that name a layout are the
    launchers' own.
    """

    model: Annotated[str | None, tyro.conf.arg(metavar="DIR|SIZE")] = None
    """A Hugging Face folder, a config.json, or a published size (0.5B, 1.5B, 3B, 7B, 14B, 32B,
    72B)."""
    num_devices: int | None = None
    """Devices; of an Ascend 910C each die is one."""
    from_log: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="METRICS.JSONL ...")] = ()
    """Logs of runs on the machine, whose speed is then fitted to their steps; what else is asked is
    as in the last of them, unless flags say otherwise."""
    device: str | None = None
    """910B by default;
    910B1, 910B2, 910B3, 910B4 (32 GiB), 910C, A100, A100-40GB, H100, B200, CPU; 910B is taken as
    910B2, and said so. npu-smi names the bin of yours."""
    devices_per_node: int | None = None
    """Devices with fast links to each other; by default the device's usual."""
    seq_length: int | None = None
    """Tokens in a sequence; by default 4096."""
    global_batch_size: int | None = None
    """Sequences per optimizer step; by default 256, or one per device where there are more."""
    micro_batch_size: int | None = None
    """Sequences that go through a rank at once; by default 1, 2, 4 and 8 are tried."""
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """The dtype of weights and activations; by default bf16."""
    attention_backend: Literal["auto", "unfused"] = "auto"
    """unfused keeps s x s scores per head; auto is a kernel that does not."""
    cross_entropy_chunk_size: int | None = None
    """Tokens whose logits exist at once; by default all."""
    lora_r: int | None = None
    """Fine-tune LoRA adapters of this rank on all linear layers, instead of all weights."""
    stage: Literal["pretrain", "sft", "dpo"] = "pretrain"
    """dpo: a sample is two sequences."""
    tensor_model_parallel_size: int | None = None
    """Only layouts with this; by default all are tried, as with what follows."""
    pipeline_model_parallel_size: int | None = None
    """Only layouts with this."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Only layouts with this."""
    num_layer_list: Annotated[str | None, tyro.conf.arg(metavar="N,N,...")] = None
    """Only stages of these layers; by default equal ones."""
    context_parallel_size: int | None = None
    """Only layouts with this; by default 1, and up to 16 where sequences are long."""
    context_parallel_algo: Literal["megatron_cp_algo", "ulysses_cp_algo", "kvallgather_cp_algo"] = (
        "megatron_cp_algo"
    )
    """What context-parallel ranks exchange."""
    sequence_parallel: YesNo | None = None
    """Only layouts with it, or without; the flag alone says yes, --no-sequence-parallel no, as with
    what follows."""
    use_distributed_optimizer: YesNo | None = None
    """Only layouts with it, or without."""
    recompute_granularity: Literal["none", "selective", "full"] | None = None
    """Only layouts with this."""
    recompute_method: Literal["uniform", "block"] | None = None
    """Full recomputing: uniform is by single layers; block recomputes the first of each chunk."""
    recompute_num_layers: int | None = None
    """How many layers block recomputes."""
    recompute_activation_function: YesNo | None = None
    """Only layouts that compute SwiGLU's output again, or that do not."""
    recompute_activation_function_num_layers: int | None = None
    """Layers of each chunk whose SwiGLU output is computed again; by default all."""
    recompute_norm: YesNo | None = None
    """Only layouts that compute the norms' outputs again, or that do not."""
    recompute_norm_num_layers: int | None = None
    """Layers of each chunk whose norms' outputs are computed again; by default all."""
    swap_attention: YesNo = "no"
    """What attention keeps waits in the host's memory; the copies are taken for hidden."""
    reuse_fp32_param: YesNo | None = None
    """fp32 weights are there in the update only; by default tried where nothing fits without."""
    o2_gradient: YesNo = "no"
    """Gradients in 16 bits."""
    o2_optimizer: YesNo = "no"
    """AdamW's moments in 16 bits."""
    use_ascend_mc2: YesNo = "no"
    """Matrix products hide a half of tensor parallelism's traffic, with sequence parallelism."""
    use_ascend_coc: YesNo = "no"
    """The same by pieces."""
    coc_parallel_num: int = 1
    """With --use-ascend-coc: how many pieces, 1 (not cut), 2, 4 or 8."""
    optimizer_cpu_offload: YesNo = "no"
    """fp32 weights and moments are in the host's memory; only layouts with the distributed
    optimizer. The seconds do not include the host's update and its copies."""
    optimizer_offload_fraction: float = 1.0
    """The fraction of them that the host holds."""
    zero_stage: Literal[1, 2, 3] | None = None
    """DeepSpeed's ZeRO trains (launch/finetune_qwen2_deepspeed.py), with data-parallel ranks alone;
    all weights, with attention that keeps no scores."""
    offload_optimizer: YesNo = "no"
    """With --zero-stage: the optimizer's state is in the host's memory."""
    offload_param: YesNo = "no"
    """With --zero-stage 3: the weights too."""
    overlap_grad_reduce: YesNo = "no"
    """Data parallelism's traffic is hidden behind backward."""
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
    words = sys.argv[1:] if argv is None else argv
    run(tyro.cli(PlanOptions, args=as_launchers_write(words), description=PlanOptions.__doc__))


def as_launchers_write(words: Sequence[str]) -> list[str]:
    """Flags without a value, as the launchers' are, with the value that they stand for."""
    known = {f"--{f.name.replace('_', '-')}" for f in fields(PlanOptions) if "YesNo" in str(f.type)}
    written: list[str] = []
    for word, after in pairwise([*words, ""]):
        if word in known and after not in ("yes", "no"):
            written += [word, "yes"]
        elif word.startswith("--no-") and (flag := f"--{word[5:]}") in known:
            written += [flag, "no"]
        elif word in ("--bf16", "--fp16"):
            written += ["--dtype", word[2:]]
        else:
            written.append(word)
    return written


def run(options: PlanOptions) -> None:
    """Plans and reports.

    Raises:
        UserError: options that cannot be.
    """
    logs = _logs(options)
    result = _plan(options, logs)
    if logs:
        print("\n".join([*log.table(logs, result.machine.rates or log.rates_of(logs)), ""]))
    if not logs:
        print(_which_bin(options.device or DEFAULT_DEVICE), end="")
    print(report.text(result, top=options.top, commands=options.commands))
    if options.json:
        report.write_json(result, options.json)
        print(f"\nwrote {options.json}")
    if options.picture:
        from qwen2_ascend.planning.picture import draw

        draw(result, options.picture)
        print(f"\nwrote {options.picture}")


def _which_bin(asked: str) -> str:
    """The line that says which bin a name without one stands for, and what the others are."""
    device = find_device(asked)
    if device.name in asked.upper():
        return ""
    kind = device.name.rstrip("0123456789")
    bins = [
        f"{name} ({other.memory / 2**30:.0f} GiB, {other.peak_flops / TERA:.0f} TFLOP/s)"
        for name, other in DEVICES.items()
        if name.startswith(kind) and name != device.name
    ]
    taken = f"--device {asked} is taken as {device.name} ({device.memory / 2**30:.0f} GiB"
    taken += f", {device.peak_flops / TERA:.0f} TFLOP/s)"
    if len(bins) < 2:
        return f"{taken}.\n"
    others = f"{', '.join(bins[:-1])} or {bins[-1]}"
    return f"{taken}. npu-smi info names yours; give --device if it is another: {others}.\n"


def plan(options: PlanOptions) -> report.Result:
    """What `qwen2-ascend plan` prints, as data: all layouts, the best first.

    Raises:
        UserError: options that cannot be.
    """
    return _plan(options, _logs(options))


def _logs(options: PlanOptions) -> list[log.LoggedRun]:
    runs = [run for metrics in options.from_log for run in log.read_log(metrics)]
    log.same_machine(runs)
    return runs


def _plan(options: PlanOptions, logs: Sequence[log.LoggedRun]) -> report.Result:
    raise_if(_faults(options))
    job, machine, choices = _job(options, logs), _machine(options, logs), _choices(options)
    plans = search.find_plans(job, machine, choices)
    fewest = search.fewest_devices(job, machine, choices)
    cheaper = None
    can_halve = job.dtype == "bf16" and choices.zero is None
    if can_halve and not any(plan.fits for plan in plans):
        in_16_bits = replace(choices, o2_gradient=True, o2_optimizer=True)
        best = search.find_plans(job, machine, in_16_bits)[0]
        cheaper = best if best.fits and in_16_bits != choices else None
    return report.Result(_name(options), job, machine, plans, fewest, cheaper)


def _name(options: PlanOptions) -> str:
    return options.model or "the log's model"


def _choices(options: PlanOptions) -> search.Choices:
    micro_batches, granularity = options.micro_batch_size, options.recompute_granularity
    is_block = options.recompute_method == "block"
    is_offloaded = options.optimizer_cpu_offload == "yes"
    return search.Choices(
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
        num_layers_per_virtual_pipeline_stage=options.num_layers_per_virtual_pipeline_stage,
        num_layer_list=_layer_list(options),
        context_parallel_size=options.context_parallel_size,
        context_parallel_algo=options.context_parallel_algo,
        sequence_parallel=_is_yes(options.sequence_parallel),
        use_distributed_optimizer=_is_yes(options.use_distributed_optimizer),
        micro_batch_sizes=(micro_batches,) if micro_batches else search.MICRO_BATCH_SIZES,
        recompute=(granularity,) if granularity else search.RECOMPUTE,
        recomputed_layers=options.recompute_num_layers if is_block else None,
        recompute_activation_function=_number_of_layers(
            options.recompute_activation_function, options.recompute_activation_function_num_layers
        ),
        recompute_norm=_number_of_layers(options.recompute_norm, options.recompute_norm_num_layers),
        reuse_fp32_param=_is_yes(options.reuse_fp32_param),
        swap_attention=options.swap_attention == "yes",
        o2_gradient=options.o2_gradient == "yes",
        o2_optimizer=options.o2_optimizer == "yes",
        mc2=options.use_ascend_mc2 == "yes" or options.coc_parallel_num > 1,
        is_fused=options.use_ascend_mc2 == "yes",
        coc_parallel_num=options.coc_parallel_num,
        optimizer_offload_fraction=options.optimizer_offload_fraction if is_offloaded else 0.0,
        overlap_grad_reduce=options.overlap_grad_reduce == "yes",
        zero=_zero(options),
    )


def _zero(options: PlanOptions) -> Zero | None:
    if options.zero_stage is None:
        return None
    return Zero(
        stage=options.zero_stage,
        offload_optimizer=options.offload_optimizer == "yes",
        offload_param=options.offload_param == "yes",
    )


def _is_yes(asked: YesNo | None) -> bool | None:
    return None if asked is None else asked == "yes"


def _number_of_layers(asked: YesNo | None, number: int | None) -> int | None:
    """The layers of each chunk whose output is computed again; None leaves it to the search."""
    if asked is None:
        return None
    return (ALL_LAYERS if number is None else number) if asked == "yes" else 0


def _layer_list(options: PlanOptions) -> tuple[int, ...] | None:
    words = options.num_layer_list
    return None if words is None else tuple(map(int, words.split(",")))


def _job(options: PlanOptions, logs: Sequence[log.LoggedRun]) -> Job:
    """The last log's, with what the options say otherwise."""
    model, chunk = options.model, options.cross_entropy_chunk_size
    config = None
    if model is not None:
        path = Path(model)
        config = Qwen2Config.from_pretrained(path) if path.exists() else Qwen2Config.named(model)
    given = {
        "config": config,
        "seq_length": options.seq_length,
        "global_batch_size": options.global_batch_size,
        "dtype": options.dtype,
        "keeps_scores": options.attention_backend == "unfused" or None,
        "cross_entropy_chunk_size": chunk,
        "lora_rank": options.lora_r,
        "pairs": options.stage == "dpo" or None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if logs:
        return replace(log.asked_like(logs[-1]), **given)
    usual = {
        "seq_length": 4096,
        "global_batch_size": max(256, options.num_devices or 0),
        "backend": find_device(options.device or DEFAULT_DEVICE).backend,
    }
    return Job(**{**usual, **given})


def _machine(options: PlanOptions, logs: Sequence[log.LoggedRun]) -> search.Machine:
    last = logs[-1] if logs else None
    device = _device(options, last.device if last else None)
    rates = log.rates_of(logs) if logs else device.rates
    per_node = options.devices_per_node or (last.devices_per_node if last else None)
    return search.Machine(
        device=device,
        num_devices=options.num_devices or (last.cut.num_devices if last else 0),
        devices_per_node=per_node or device.devices_per_node,
        memory_fraction=options.memory_fraction,
        rates=_rates(options, rates),
    )


def _rates(options: PlanOptions, known: Rates) -> Rates:
    given = {"products": options.efficiency, "links": options.bandwidth_efficiency}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return known
    source = f"{' and '.join(given)} as given; else {known.source}"
    return replace(known, **given, source=source)


def _device(options: PlanOptions, logged: Device | None) -> Device:
    """The log's or the table's, with what the options say otherwise."""
    given = {
        "memory": (options.memory_gb, GB),
        "peak_flops": (options.peak_tflops, TERA),
        "memory_bandwidth": (options.memory_bandwidth_gb, GB),
        "node_bandwidth": (options.node_bandwidth_gb, GB),
        "network_bandwidth": (options.network_bandwidth_gb, GB),
    }
    device = logged or find_device(options.device or DEFAULT_DEVICE)
    changes = {name: value * unit for name, (value, unit) in given.items() if value is not None}
    if not changes:
        return device
    source = f"{', '.join(changes)} as given; else {device.source}"
    assumed = tuple(name for name in device.assumed if name not in changes)
    return replace(device, **changes, source=source, assumed=assumed)


def _combination_faults(options: PlanOptions) -> list[str]:
    """Flags that need another, or exclude one; as the launchers say it."""
    needs = {
        "--reuse-fp32-param needs --bf16.": options.reuse_fp32_param == "yes"
        and options.dtype not in (None, "bf16"),
        "--o2-gradient needs --bf16.": options.o2_gradient == "yes"
        and options.dtype not in (None, "bf16"),
        "--o2-optimizer needs --bf16.": options.o2_optimizer == "yes"
        and options.dtype not in (None, "bf16"),
        "--recompute-method needs --recompute-granularity full.": options.recompute_method
        is not None
        and options.recompute_granularity != "full",
        "--recompute-method block needs --recompute-num-layers.": options.recompute_method
        == "block"
        and options.recompute_num_layers is None,
    }
    for what in ("activation_function", "norm"):
        flag = f"--recompute-{what.replace('_', '-')}"
        number = getattr(options, f"recompute_{what}_num_layers")
        is_on = getattr(options, f"recompute_{what}") == "yes"
        needs[f"{flag}-num-layers needs {flag}."] = number is not None and not is_on
        needs[f"{flag}-num-layers {number} must not be negative."] = (number or 0) < 0
    faults = [fault for fault, is_one in needs.items() if is_one]
    faults += _overlap_and_offload_faults(options) + _zero_faults(options)
    words = options.num_layer_list
    if words is not None and not all(word.isdecimal() for word in words.split(",")):
        faults.append(f"--num-layer-list {words}: give whole numbers, as in 6,8,8,6.")
    return faults


def _zero_faults(options: PlanOptions) -> list[str]:
    stage = options.zero_stage
    rules = {
        "--offload-optimizer needs --zero-stage.": options.offload_optimizer == "yes"
        and stage is None,
        "--offload-param needs --zero-stage 3.": options.offload_param == "yes" and stage != 3,
    }
    absent = {
        "--lora-r": options.lora_r is not None,
        "--stage dpo": options.stage == "dpo",
        "--attention-backend unfused": options.attention_backend == "unfused",
        "--cross-entropy-chunk-size": options.cross_entropy_chunk_size is not None,
        "--sequence-parallel": options.sequence_parallel == "yes",
        "--use-distributed-optimizer": options.use_distributed_optimizer == "yes",
        "--optimizer-cpu-offload": options.optimizer_cpu_offload == "yes",
        "--reuse-fp32-param": options.reuse_fp32_param == "yes",
        "--o2-gradient": options.o2_gradient == "yes",
        "--o2-optimizer": options.o2_optimizer == "yes",
        "--swap-attention": options.swap_attention == "yes",
        "--recompute-norm": options.recompute_norm == "yes",
        "--recompute-activation-function": options.recompute_activation_function == "yes",
        "--recompute-granularity selective": options.recompute_granularity == "selective",
        "--recompute-method block": options.recompute_method == "block",
        "--num-layer-list": options.num_layer_list is not None,
    }
    rules |= {
        f"{flag} is not planned with --zero-stage; leave one of them out.": is_on
        and stage is not None
        for flag, is_on in absent.items()
    }
    return [fault for fault, is_broken in rules.items() if is_broken]


def _overlap_and_offload_faults(options: PlanOptions) -> list[str]:
    """The faults that the launchers find too."""
    pieces, fraction = options.coc_parallel_num, options.optimizer_offload_fraction
    coc, offload = "--use-ascend-coc", "--optimizer-cpu-offload"
    is_coc, is_offloaded = options.use_ascend_coc == "yes", options.optimizer_cpu_offload == "yes"
    rules = {
        f"--use-ascend-mc2 and {coc}: give one of them.": is_coc
        and options.use_ascend_mc2 == "yes",
        f"--coc-parallel-num {pieces} is not 1, 2, 4 or 8, as in MindSpeed.": pieces
        not in (1, 2, 4, 8),
        f"--coc-parallel-num {pieces} needs {coc}.": pieces != 1 and not is_coc,
        f"--optimizer-offload-fraction {fraction:g} must be from 0 to 1.": not 0 <= fraction <= 1,
        f"--optimizer-offload-fraction needs {offload}.": fraction != 1 and not is_offloaded,
        f"{offload} needs --bf16 or --fp16.": is_offloaded and options.dtype == "fp32",
        f"{offload} needs --use-distributed-optimizer, as in Megatron-LM.": is_offloaded
        and options.use_distributed_optimizer == "no",
        f"{offload} and --reuse-fp32-param: give one of them.": is_offloaded
        and options.reuse_fp32_param == "yes",
        f"{offload} and --o2-optimizer: give one of them.": is_offloaded
        and options.o2_optimizer == "yes",
    }
    return [fault for fault, is_broken in rules.items() if is_broken]


def _faults(options: PlanOptions) -> list[str]:
    at_least_one = {
        "--num-devices": options.num_devices,
        "--devices-per-node": options.devices_per_node,
        "--micro-batch-size": options.micro_batch_size,
        "--context-parallel-size": options.context_parallel_size,
        "--recompute-num-layers": options.recompute_num_layers,
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
        f"{k} {v} must be above zero, and a figure that a device can have."
        for k, v in above_zero.items()
        if v is not None and not 0 < v < MOST
    ]
    faults += _combination_faults(options)
    if options.commands < 0:
        faults.append(f"--commands {options.commands} must not be negative.")
    if options.from_log and options.device:
        faults.append("--from-log says which device it is; leave out --device.")
    elif not options.from_log:
        absent = {"--model": options.model, "--num-devices": options.num_devices}
        faults += [f"give {flag}, or --from-log." for flag, it in absent.items() if it is None]
    try:
        find_device(options.device or DEFAULT_DEVICE)
    except UserError as error:
        faults += error.faults
    for flag, path in {"--json": options.json, "--picture": options.picture}.items():
        if path is not None and path.is_dir():
            faults.append(f"{flag} {path} is a folder; name a file in it.")
        elif path is not None and not path.absolute().parent.is_dir():
            faults.append(f"{flag} {path}: there is no folder {path.absolute().parent}; make it.")
    return faults
