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
from qwen2_ascend.errors import Faults, raise_if
from qwen2_ascend.figures import report_faults
from qwen2_ascend.files import output_faults
from qwen2_ascend.flags import LAYOUT_SIZES, flag_of, layer_list, number_faults
from qwen2_ascend.parallel import ParallelLayout
from qwen2_ascend.planning import log, report, search
from qwen2_ascend.planning.devices import DEVICES, GB, TERA, Device, Rates, find_device
from qwen2_ascend.planning.job import ALL_LAYERS, Job, Zero
from qwen2_ascend.planning.picture import draw
from qwen2_ascend.training.optimizer_settings import OptimizerSettings, PrecisionSettings
from qwen2_ascend.training.overlap import OverlapSettings
from qwen2_ascend.training.recompute_settings import RECOMPUTED_WHOLE

YesNo = Literal["yes", "no"]
DEFAULT_DEVICE = "910B"
NEVER_WITH_ZERO = (
    *("lora_r", "cross_entropy_chunk_size", "num_layer_list", "sequence_parallel"),
    *("use_distributed_optimizer", "optimizer_cpu_offload", "reuse_fp32_param", "o2_gradient"),
    *("o2_optimizer", "swap_attention", "recompute_norm", "recompute_activation_function"),
    "overlap_grad_reduce",
)
"""Options that are not planned with --zero-stage, whatever their values."""
NOT_WITH_ZERO = ("stage dpo", "attention_backend unfused")
NOT_WITH_ZERO += ("recompute_granularity selective", "recompute_method block")
"""Options that are not planned with it at one value."""
OUTPUTS = ("activation_function", "norm")
"""What --recompute-... computes again alone."""
SHARES = ("memory_fraction", "efficiency", "bandwidth_efficiency")
FIGURES = {
    "memory_gb": ("memory", GB),
    "peak_tflops": ("peak_flops", TERA),
    "memory_bandwidth_gb": ("memory_bandwidth", GB),
    "node_bandwidth_gb": ("node_bandwidth", GB),
    "network_bandwidth_gb": ("network_bandwidth", GB),
}
"""Options that say another figure of the device, which field of `Device` it is, and its unit."""
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
    attention_backend: Literal["auto", "unfused"] | None = None
    """unfused keeps s x s scores per head; auto, the default, is a kernel that does not."""
    cross_entropy_chunk_size: int | None = None
    """Tokens whose logits exist at once; by default all."""
    lora_r: int | None = None
    """Fine-tune LoRA adapters of this rank on all linear layers, instead of all weights."""
    stage: Literal["pretrain", "sft", "dpo"] | None = None
    """dpo: a sample is two sequences; by default pretrain."""
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
    """How many layers block recomputes; uniform is planned by 1, whatever this is."""
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
    known = {flag_of(f.name) for f in fields(PlanOptions) if "YesNo" in str(f.type)}
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
    else:
        print(_which_bin(options.device or DEFAULT_DEVICE), end="")
    if options.recompute_method == "uniform":
        print(report.uniform_note(options.recompute_num_layers), end="")
    print(report.text(result, top=options.top, commands=options.commands))
    if options.json:
        report.write_json(result, options.json)
        print(f"\nwrote {options.json}")
    if options.picture:
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
    if (layers := choices.num_layer_list) is not None:
        pp = choices.pipeline_model_parallel_size or len(layers)
        ParallelLayout(pipeline_model_parallel_size=pp, num_layer_list=layers).check(job.config)
    plans = search.find_plans(job, machine, choices)
    fewest = search.fewest_devices(job, machine, choices)
    cheaper = None
    can_halve = job.dtype == "bf16" and choices.zero is None
    if can_halve and not any(plan.fits for plan in plans):
        in_16_bits = replace(choices, o2_gradient=True, o2_optimizer=True)
        best = search.find_plans(job, machine, in_16_bits)[0]
        cheaper = best if best.fits and in_16_bits != choices else None
    return report.Result(options.model or "the log's model", job, machine, plans, fewest, cheaper)


def _choices(options: PlanOptions) -> search.Choices:
    micro_batches, granularity = options.micro_batch_size, options.recompute_granularity
    is_block = options.recompute_method == "block"
    is_offloaded = options.optimizer_cpu_offload == "yes"
    return search.Choices(
        **{size: getattr(options, size) for size in LAYOUT_SIZES},
        num_layer_list=layer_list(options.num_layer_list),
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
    return _is(asked, "yes")


def _is(asked: str | None, value: str) -> bool | None:
    """Whether an option has a value; None where it is not given."""
    return None if asked is None else asked == value


def _number_of_layers(asked: YesNo | None, number: int | None) -> int | None:
    """The layers of each chunk whose output is computed again; None leaves it to the search."""
    if asked is None:
        return None
    return (ALL_LAYERS if number is None else number) if asked == "yes" else 0


def _job(options: PlanOptions, logs: Sequence[log.LoggedRun]) -> Job:
    """The last log's, with what the options say otherwise."""
    model, config = options.model, None
    if model is not None:
        path = Path(model)
        config = Qwen2Config.from_pretrained(path) if path.exists() else Qwen2Config.named(model)
    given = {
        "config": config,
        "seq_length": options.seq_length,
        "global_batch_size": options.global_batch_size,
        "dtype": options.dtype,
        "keeps_scores": _is(options.attention_backend, "unfused"),
        "cross_entropy_chunk_size": options.cross_entropy_chunk_size,
        "lora_rank": options.lora_r,
        "pairs": _is(options.stage, "dpo"),
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
    device = logged or find_device(options.device or DEFAULT_DEVICE)
    changes = {
        name: value * unit
        for option, (name, unit) in FIGURES.items()
        if (value := getattr(options, option)) is not None
    }
    if not changes:
        return device
    source = f"{', '.join(changes)} as given; else {device.source}"
    assumed = tuple(name for name in device.assumed if name not in changes)
    return replace(device, **changes, source=source, assumed=assumed)


def _combination_faults(options: PlanOptions) -> list[str]:
    """Flags that need another, or exclude one."""
    faults = []
    if options.recompute_method is not None and options.recompute_granularity != "full":
        faults.append("--recompute-method needs --recompute-granularity full.")
    if options.recompute_method == "block" and options.recompute_num_layers is None:
        faults.append("--recompute-method block needs --recompute-num-layers.")
    if options.recompute_method is None and options.recompute_num_layers is not None:
        faults.append("--recompute-num-layers needs --recompute-method.")
    is_whole = options.recompute_granularity == "full" and options.recompute_method != "block"
    for what in (f"recompute_{output}" for output in OUTPUTS):
        is_on = getattr(options, what) == "yes"
        if not is_on and getattr(options, f"{what}_num_layers") is not None:
            faults.append(f"{flag_of(what)}-num-layers needs {flag_of(what)}.")
        if is_on and is_whole:
            faults.append(RECOMPUTED_WHOLE.format(flag_of(what)))
    if is_whole and options.swap_attention == "yes":
        faults.append(RECOMPUTED_WHOLE.format("--swap-attention"))
    return faults + _training_faults(options) + _zero_faults(options)


def _training_faults(options: PlanOptions) -> list[str]:
    """What the launchers say of flags that they have too."""
    precision = PrecisionSettings(
        bf16=options.dtype in (None, "bf16"),
        fp16=options.dtype == "fp16",
        reuse_fp32_param=options.reuse_fp32_param == "yes",
        o2_gradient=options.o2_gradient == "yes",
        o2_optimizer=options.o2_optimizer == "yes",
    )
    optimizer = OptimizerSettings(
        lr=1.0,
        optimizer_cpu_offload=options.optimizer_cpu_offload == "yes",
        optimizer_offload_fraction=options.optimizer_offload_fraction,
    )
    overlap = OverlapSettings(
        use_ascend_mc2=options.use_ascend_mc2 == "yes",
        use_ascend_coc=options.use_ascend_coc == "yes",
        coc_parallel_num=options.coc_parallel_num,
    )
    is_distributed = options.use_distributed_optimizer != "no"
    return precision.faults() + optimizer.faults(precision, is_distributed) + overlap.flag_faults()


def _zero_faults(options: PlanOptions) -> list[str]:
    stage, faults = options.zero_stage, []
    if stage is None and options.offload_optimizer == "yes":
        faults.append("--offload-optimizer needs --zero-stage.")
    if stage != 3 and options.offload_param == "yes":
        faults.append("--offload-param needs --zero-stage 3.")
    if stage is None:
        return faults
    given = [
        flag_of(name) for name in NEVER_WITH_ZERO if getattr(options, name) not in (None, "no")
    ]
    for name, value in map(str.split, NOT_WITH_ZERO):
        given += [f"{flag_of(name)} {value}"] * (getattr(options, name) == value)
    return faults + [
        f"{flag} is not planned with --zero-stage; leave one of them out." for flag in given
    ]


def _faults(options: PlanOptions) -> list[str]:
    counts = ("num_devices", "devices_per_node", "micro_batch_size", *LAYOUT_SIZES)
    counts += ("recompute_num_layers", "global_batch_size", "top")
    faults = Faults(
        f"{flag_of(name)} {value!r} is not a whole number."
        for name in counts
        if (value := getattr(options, name)) is not None and not isinstance(value, int)
    )
    if faults:
        return faults
    numbers = ("commands", *(f"recompute_{what}_num_layers" for what in OUTPUTS))
    faults += number_faults(options, at_least_one=counts, not_negative=numbers)
    faults.collect(lambda: layer_list(options.num_layer_list))
    faults += [
        f"{flag_of(name)} {value} must be above 0 and at most 1."
        for name in SHARES
        if (value := getattr(options, name)) is not None and not 0 < value <= 1
    ]
    faults += [
        f"{flag_of(name)} {value} must be above zero, and a figure that a device can have."
        for name in FIGURES
        if (value := getattr(options, name)) is not None and not 0 < value < MOST
    ]
    faults += _combination_faults(options)
    if options.from_log and options.device:
        faults.append("--from-log says which device it is; leave out --device.")
    elif not options.from_log:
        absent = {"--model": options.model, "--num-devices": options.num_devices}
        faults += [f"give {flag}, or --from-log." for flag, it in absent.items() if it is None]
    faults.collect(lambda: find_device(options.device or DEFAULT_DEVICE))
    if options.picture:
        faults += report_faults("--picture", "matplotlib")
    faults += output_faults("--json", options.json)
    faults += output_faults("--picture", options.picture)
    return faults
