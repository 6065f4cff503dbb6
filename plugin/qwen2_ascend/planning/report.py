"""What was found: a table and launch commands for people, JSON for machines."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from qwen2_ascend.flags import flag_of
from qwen2_ascend.markdown import aligned
from qwen2_ascend.planning.devices import GB
from qwen2_ascend.planning.job import ALL_LAYERS, Job, RunLayout, Zero
from qwen2_ascend.planning.parameters import num_parameters
from qwen2_ascend.planning.roofline import bubble_fraction
from qwen2_ascend.planning.search import Machine, Plan
from qwen2_ascend.planning.traffic import step_traffic


class Result(NamedTuple):
    """An answered question."""

    model: str
    job: Job
    machine: Machine
    plans: list[Plan]
    """The best first."""
    fewest: Plan | None
    """The plan on the smallest number of devices that the job fits on."""
    in_16_bits: Plan | None = None
    """The best plan with --o2-gradient and --o2-optimizer, if only that fits."""


def best_of_each_shape(plans: list[Plan]) -> list[Plan]:
    """The best plan of each TP, PP, VPP, DP, in the order of `plans`."""
    shapes: dict[str, Plan] = {}
    for plan in plans:
        shapes.setdefault(plan.cut.label(), plan)
    return list(shapes.values())


def text(result: Result, *, top: int, commands: int) -> str:
    """The answer, a table of the best layouts, and launch commands of the first of them."""
    shown = best_of_each_shape(result.plans)[:top]
    fitting = [plan for plan in shown if plan.fits]
    lines = [answer(result), "", *_table(shown), "", *map(str, notes(result))]
    for plan in fitting[:commands]:
        what = "on random tokens (give --load and --data-path instead)"
        if result.job.lora_rank is not None or plan.cut.zero is not None:
            what = "with the model's folder and your chats"
        lines += ["", f"{plan.cut.label()}, {what}:"]
        lines += ["", launch_command(result.model, plan.cut, result.machine)]
    return "\n".join(lines)


def uniform_note(num_layers: int | None) -> str:
    """The line that says how uniform recomputing is planned; nothing where that is as asked."""
    if num_layers in (None, 1):
        return ""
    return (
        f"--recompute-num-layers {num_layers}: uniform is planned as with 1, each layer on its "
        f"own; by {num_layers}, fewer inputs of layers are kept and more of them are computed at "
        "once.\n"
    )


class Said(NamedTuple):
    """A text of TEXTS by its name, filled in with texts, numbers and others of these."""

    key: str
    values: Mapping[str, Any] = {}

    def __str__(self) -> str:
        return TEXTS[self.key].format(**self.values)


class Listed(tuple):
    """Words with commas between them."""

    def __str__(self) -> str:
        return ", ".join(map(str, self))


TEXTS = {
    "plan_asked": "{model} ({parameters} parameters, {dtype}, {trained}, {samples}, {batch} per "
    "step) on {cards} x {device}, {usable} of {memory} GB usable:",
    "plan_all_weights": "all weights",
    "plan_adapters": "LoRA rank {rank}",
    "plan_sequences": "sequences of {length}",
    "plan_pairs": "pairs of sequences of {length}",
    "plan_does_fit": "fits: {fitting} of {all} valid layouts; the smallest takes {gb} GB on the "
    "fullest card ({layout}).",
    "plan_does_not": "does not fit: none of {all} valid layouts; the smallest takes {gb} GB on the "
    "fullest card ({layout}).",
    "plan_nowhere": "No number of these devices that was tried is enough.",
    "plan_fewest": "The fewest it fits on: {devices}, {gb} GB ({layout}).",
    "plan_one_device": "1 device",
    "plan_devices": "{number} devices",
    "plan_16_bits": "With --o2-gradient --o2-optimizer, which cost precision, it fits: {gb} GB "
    "({layout}).",
    "plan_micro": "micro-batch {size}",
    "plan_zero": "ZeRO stage {stage}",
    "plan_sequence_parallel": "sequence parallel",
    "plan_distributed": "distributed optimizer",
    "plan_recomputed": "{what} recompute",
    "plan_columns": "GB is what the fullest card holds at the fullest moment of a step; tight "
    "leaves less than {headroom} of the card. TP (with SP), CP, PP, DP GB are sent per card and "
    "step.\ns/step and tok/s (per card) are predicted, not measured here: constants are {source}.",
    "plan_source": "{device}: {source}.",
    "plan_assumed": "Assumed, for want of figures: {names}; --help has flags for yours.",
}
"""What the planner says. The board's page has the same texts, and a Chinese one of each."""


def answer(result: Result) -> str:
    """Whether it fits, and what would."""
    return "\n".join(map(str, said(result)))


def said(result: Result) -> list[Said]:
    """The sentences of `answer`."""
    machine, sentences = result.machine, [_asked(result)]
    fitting = sum(plan.fits for plan in result.plans)
    best = min(result.plans, key=lambda plan: plan.memory.total)
    counts = {"fitting": fitting, "all": len(result.plans)}
    sentences.append(Said("plan_does_fit" if fitting else "plan_does_not", counts | _size(best)))
    fewest = result.fewest
    if fewest is None:
        sentences.append(Said("plan_nowhere"))
    elif fewest.cut.num_devices != machine.num_devices:
        number = fewest.cut.num_devices
        devices = (
            Said("plan_devices", {"number": number}) if number > 1 else Said("plan_one_device")
        )
        sentences.append(Said("plan_fewest", {"devices": devices} | _size(fewest)))
    if result.in_16_bits is not None:
        sentences.append(Said("plan_16_bits", _size(result.in_16_bits)))
    return sentences


def _asked(result: Result) -> Said:
    job, machine = result.job, result.machine
    parameters = num_parameters(job.config)
    unit = 9 if parameters >= 1e8 else 6
    adapters = Said("plan_adapters", {"rank": job.lora_rank})
    samples = "plan_pairs" if job.pairs else "plan_sequences"
    values = {
        "model": result.model,
        "parameters": f"{parameters / 10**unit:.2f}e{unit}",
        "dtype": job.dtype,
        "trained": adapters if job.lora_rank else Said("plan_all_weights"),
        "samples": Said(samples, {"length": job.seq_length}),
        "batch": job.global_batch_size,
        "cards": machine.num_devices,
        "device": machine.device.name,
        "usable": f"{machine.usable_memory / GB:.1f}",
        "memory": f"{machine.device.memory / GB:.1f}",
    }
    return Said("plan_asked", values)


def _size(plan: Plan) -> dict[str, Any]:
    return {"gb": _gb(plan.memory.total), "layout": _settings(plan.cut)}


def _settings(cut: RunLayout) -> Listed:
    """All of a cut in a few words."""
    words: list[Any] = [cut.label(), Said("plan_micro", {"size": cut.micro_batch_size})]
    if cut.zero is not None:
        words.append(Said("plan_zero", {"stage": cut.zero.stage}))
    words += [Said("plan_sequence_parallel")] * cut.sequence_parallel
    words += [Said("plan_distributed")] * cut.distributed_optimizer
    if (what := recompute_words(cut)) != "-":
        words.append(Said("plan_recomputed", {"what": what}))
    return Listed([*words, *(flag for flag, is_on in _further_flags(cut).items() if is_on)])


def recompute_words(cut: RunLayout) -> str:
    """What of a cut is recomputed, in a table's cell."""
    if cut.recompute == "full" and cut.recomputed_layers is not None:
        return f"block {cut.recomputed_layers // cut.num_chunks}"
    if cut.recompute != "none":
        return cut.recompute
    outputs = ["swiglu"] * bool(cut.recompute_activation_function)
    outputs += ["norm"] * bool(cut.recompute_norm)
    return "+".join(outputs) or "-"


def _further_flags(cut: RunLayout) -> dict[str, bool]:
    fraction = cut.optimizer_offload_fraction
    of_it = f" --optimizer-offload-fraction {fraction:g}" * (fraction < 1)
    pieces = cut.coc_parallel_num
    return {
        f"--optimizer-cpu-offload{of_it}": fraction > 0,
        "--use-ascend-mc2": cut.mc2 and pieces == 1,
        f"--use-ascend-coc --coc-parallel-num {pieces}": cut.mc2 and pieces > 1,
        "--overlap-grad-reduce": cut.overlap_grad_reduce,
        "--reuse-fp32-param": cut.reuse_fp32_param,
        "--swap-attention": cut.swap_attention,
        "--o2-gradient": cut.o2_gradient,
        "--o2-optimizer": cut.o2_optimizer,
    }


_COLUMNS = {
    "layout": lambda plan: plan.cut.label(),
    "mbs": lambda plan: str(plan.cut.micro_batch_size),
    "SP": lambda plan: "yes" if plan.cut.sequence_parallel else "-",
    "dist-opt": lambda plan: "yes" if plan.cut.distributed_optimizer else "-",
    "recompute": lambda plan: recompute_words(plan.cut),
    "GB": lambda plan: _gb(plan.memory.total),
    "fits": lambda plan: "yes" if plan.has_headroom else "tight" if plan.fits else "no",
    "weights": lambda plan: _gb(plan.memory.weights),
    "grads": lambda plan: _gb(plan.memory.gradients),
    "optim": lambda plan: _gb(plan.memory.optimizer),
    "activ": lambda plan: _gb(plan.memory.activations + plan.memory.temporary),
    "logits": lambda plan: _gb(plan.memory.logits),
    "buffers": lambda plan: _gb(plan.memory.buffers),
    "bubble": lambda plan: f"{bubble_fraction(plan.cut):.1%}",
}


def _gb(num_bytes: float) -> str:
    """One decimal; of less than that the first digits."""
    is_small = 0 < num_bytes < 0.1 * GB
    return f"{num_bytes / GB:.1g}" if is_small else f"{num_bytes / GB:.1f}"


def _table(plans: list[Plan]) -> list[str]:
    rows = [[*_COLUMNS, "TP GB", "CP GB", "PP GB", "DP GB", "s/step", "tok/s"]]
    for plan in plans:
        sent = step_traffic(plan.cut)
        devices = plan.cut.num_devices
        rows.append(
            [column(plan) for column in _COLUMNS.values()]
            + [_gb((sent["TP"] + sent["SP"]) / devices)]
            + [_gb(sent["CP"] / devices), _gb(sent["PP"] / devices)]
            + [_gb(sent["DP"] / devices), f"{plan.time.total:.3g}"]
            + [f"{plan.cut.job.tokens_per_step / plan.time.total / devices:,.0f}"]
        )
    return aligned(rows)


def notes(result: Result) -> list[Said]:
    """What the table's columns are, and where figures and constants are from."""
    device = result.machine.device
    rates = result.machine.rates or device.rates
    headroom = f"{result.machine.headroom:.0%}"
    found = [
        Said("plan_columns", {"headroom": headroom, "source": rates.source}),
        Said("plan_source", {"device": device.name, "source": device.source}),
    ]
    if names := Listed(name.replace("_", " ") for name in device.assumed):
        found.append(Said("plan_assumed", {"names": names}))
    return found


# --- launch commands ------------------------------------------------------------------------------


def launch_command(model: str, cut: RunLayout, machine: Machine) -> str:
    """What starts this cut on one node, or on each of several."""
    words = [*_torchrun(cut, machine), _script(cut), *launch_flags(model, cut)]
    lines, line = [], words[0]
    for flag in words[1:]:
        if len(line) + len(flag) > 96:
            lines.append(line)
            line = f"    {flag}"
        else:
            line = f"{line} {flag}"
    return " \\\n".join([*lines, line])


def _script(cut: RunLayout) -> str:
    if cut.zero is not None:
        return "launch/finetune_qwen2_deepspeed.py"
    kind = "pretrain" if cut.job.lora_rank is None else "finetune"
    return f"launch/{kind}_qwen2.py"


def _torchrun(cut: RunLayout, machine: Machine) -> Iterator[str]:
    nodes = -(-cut.num_devices // machine.devices_per_node)
    yield "torchrun"
    if nodes > 1:
        yield f"--nnodes {nodes} --node-rank $NODE_RANK"
    yield f"--nproc-per-node {-(-cut.num_devices // nodes)}"
    if nodes > 1:
        yield "--master-addr $MASTER_ADDR --master-port 29500"


def launch_flags(model: str, cut: RunLayout) -> list[str]:
    """The launcher's flags, each with its value."""
    if cut.zero is not None:
        return _zero_flags(model, cut, cut.zero)
    job = cut.job
    source, data = "--config", "--mock-data"
    if job.lora_rank is not None:
        source, data = "--load", "--data-path CHATS.jsonl"
    flags = [
        f"{source} {shlex.quote(model)}",
        data,
        f"--device {job.backend}",
        f"--tensor-model-parallel-size {cut.tp}",
        f"--pipeline-model-parallel-size {cut.pp}",
    ]
    if cut.num_layer_list is not None:
        flags.append(f"--num-layer-list {','.join(map(str, cut.num_layer_list))}")
    if cut.cp > 1:
        flags.append(f"--context-parallel-size {cut.cp}")
        flags.append(f"--context-parallel-algo {cut.context_parallel_algo}")
    if cut.layers_per_chunk:
        flags.append(f"--num-layers-per-virtual-pipeline-stage {cut.layers_per_chunk}")
    if cut.vocabulary_is_padded:
        flags.append("--make-vocab-size-divisible-by 128")
    flags += ["--sequence-parallel"] * cut.sequence_parallel
    flags += ["--use-distributed-optimizer"] * cut.distributed_optimizer
    flags += [
        f"--micro-batch-size {cut.micro_batch_size}",
        f"--global-batch-size {job.global_batch_size}",
        f"--seq-length {job.seq_length}",
    ]
    if cut.recompute == "selective":
        flags.append("--recompute-granularity selective")
    elif cut.recompute == "full" and cut.recomputed_layers is not None:
        flags.append("--recompute-granularity full --recompute-method block")
        flags.append(f"--recompute-num-layers {cut.recomputed_layers // cut.num_chunks}")
    elif cut.recompute == "full":
        flags.append("--recompute-granularity full --recompute-method uniform")
        flags.append("--recompute-num-layers 1")
    for name in ("activation_function", "norm"):
        number, flag = getattr(cut, f"recompute_{name}"), flag_of(f"recompute_{name}")
        if number:
            flags.append(flag if number >= ALL_LAYERS else f"{flag} {flag}-num-layers {number}")
    flags += [flag for flag, is_on in _further_flags(cut).items() if is_on]
    flags += ["--attention-backend unfused"] * job.keeps_scores
    if job.cross_entropy_chunk_size:
        flags.append(f"--cross-entropy-chunk-size {job.cross_entropy_chunk_size}")
    if job.lora_rank is not None:
        flags.append(f"--lora-r {job.lora_rank}")
    flags += [f"--{job.dtype}"] * (job.dtype != "fp32")
    return [*flags, "--train-iters 20", "--lr 1e-5"]


def _zero_flags(model: str, cut: RunLayout, zero: Zero) -> list[str]:
    job = cut.job
    full = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    return [
        f"--load {shlex.quote(model)} --data-path CHATS.jsonl",
        f"--device {job.backend}",
        f"--zero-stage {zero.stage}",
        *["--offload-optimizer"] * zero.offload_optimizer,
        *["--offload-param"] * zero.offload_param,
        f"--micro-batch-size {cut.micro_batch_size}",
        f"--global-batch-size {job.global_batch_size}",
        f"--seq-length {job.seq_length}",
        *[full] * (cut.recompute == "full"),
        *[f"--{job.dtype}"] * (job.dtype != "fp32"),
        "--train-iters 20 --lr 1e-5",
    ]


# --- JSON -----------------------------------------------------------------------------------------


def write_json(result: Result, path: Path) -> None:
    """All layouts, the best first, and what was asked; bytes and seconds."""
    job, machine = result.job, result.machine
    content = {
        "model": result.model,
        "parameters": num_parameters(job.config),
        "dtype": job.dtype,
        "seq_length": job.seq_length,
        "global_batch_size": job.global_batch_size,
        "attention_backend": "unfused" if job.keeps_scores else "auto",
        "cross_entropy_chunk_size": job.cross_entropy_chunk_size,
        "lora_rank": job.lora_rank,
        "device": asdict(machine.device),
        "num_devices": machine.num_devices,
        "devices_per_node": machine.devices_per_node,
        "usable_memory": machine.usable_memory,
        "rates": vars(machine.rates or machine.device.rates),
        "fits": any(plan.fits for plan in result.plans),
        "fewest": None if result.fewest is None else as_dict(result.fewest),
        "layouts": [as_dict(plan) for plan in result.plans],
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def as_dict(plan: Plan) -> dict[str, Any]:
    """One layout, in bytes and seconds."""
    cut, memory = plan.cut, plan.memory
    return {
        "num_devices": cut.num_devices,
        "tensor_model_parallel_size": cut.tp,
        "pipeline_model_parallel_size": cut.pp,
        "num_layers_per_virtual_pipeline_stage": cut.layers_per_chunk,
        "num_layer_list": cut.num_layer_list,
        "context_parallel_size": cut.cp,
        "data_parallel_size": cut.dp,
        "sequence_parallel": cut.sequence_parallel,
        "use_distributed_optimizer": cut.distributed_optimizer,
        "recompute_granularity": None if cut.recompute == "none" else cut.recompute,
        "recomputed_layers_of_a_stage": cut.recomputed_layers,
        "recompute_activation_function": cut.recompute_activation_function > 0,
        "recompute_norm": cut.recompute_norm > 0,
        "reuse_fp32_param": cut.reuse_fp32_param,
        "swap_attention": cut.swap_attention,
        "o2_gradient": cut.o2_gradient,
        "o2_optimizer": cut.o2_optimizer,
        "use_ascend_mc2": cut.mc2 and cut.coc_parallel_num == 1,
        "coc_parallel_num": cut.coc_parallel_num,
        "zero": None if cut.zero is None else asdict(cut.zero),
        "optimizer_offload_fraction": cut.optimizer_offload_fraction,
        "context_parallel_algo": cut.context_parallel_algo,
        "micro_batch_size": cut.micro_batch_size,
        "padded_vocab_size": cut.padded_vocab_size,
        "fits": plan.fits,
        "has_headroom": plan.has_headroom,
        "fullest_stage": plan.stage,
        "memory": {**memory._asdict(), "total": memory.total},
        "predicted_seconds": {**plan.time._asdict(), "total": plan.time.total},
        "bubble": bubble_fraction(cut),
    }
