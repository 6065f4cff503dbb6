"""Training against transformers and plain megatron-core; fused against plain layers on an NPU."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import tyro

from qwen2_ascend import markdown
from qwen2_ascend.benchmark.energy import SideEnergy, energy_figures, energy_table
from qwen2_ascend.benchmark.faults import chosen_device, count_faults, dtype_faults, side_faults
from qwen2_ascend.benchmark.measure import largest_difference, spread
from qwen2_ascend.benchmark.sides import Side, interleaved, running
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.planning.devices import find_device
from qwen2_ascend.planning.flops import train_flops_per_token
from qwen2_ascend.planning.parameters import num_parameters

SIDES = ("ours", "ours-plain", "transformers", "megatron-core")
SMALL = Qwen2Config(
    num_layers=8,
    hidden_size=512,
    ffn_hidden_size=2816,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=64,
    vocab_size=8192,
    max_position_embeddings=4096,
    dtype="fp32",
)
"""The model without --config and --load: the 0.5B's proportions in a size that a CPU trains."""
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
"""Largest relative difference between two sides' losses with which they do the same work."""


@dataclass(frozen=True, kw_only=True)
class TrainBenchmark:
    """Steps of training, on one device: this project, transformers and plain megatron-core.

    All sides begin at the same weights, read the same batches and have to arrive at the same
    losses, else the command fails. transformers runs with SDPA and torch's fused AdamW, in bf16
    under autocast, as its Trainer does; megatron-core is its own GPTModel with its local layer
    spec. On an npu ours-plain is this project with all its fused kernels switched off. Each round
    asks every side in turn; ratios are of the pairs of a round, above 1 where this project is
    faster.
    """

    config: Annotated[str | None, tyro.conf.arg(metavar="DIR|SIZE")] = None
    """Model config with random weights: a Hugging Face folder, a config.json or a published size;
    by default a small model (hidden 512, 8 layers, vocabulary 8192)."""
    load: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Hugging Face folder whose weights to train, instead of --config."""
    num_layers: int | None = None
    """With --config: so many layers instead, for a model that is too large for one device."""
    sides: tuple[str, ...] = ()
    """Some of ours, ours-plain, transformers and megatron-core; by default all that the device has.
    The others are compared with the first."""
    device: Literal["auto", "npu", "cuda", "cpu"] = "auto"
    """auto takes npu, else cuda, else cpu."""
    dtypes: tuple[str, ...] = ("fp32",)
    """fp32, bf16 (with fp32 main weights) or both."""
    seq_length: int = 512
    """Tokens in a sequence."""
    micro_batch_size: int = 2
    """Sequences at once."""
    global_batch_size: int | None = None
    """Sequences per optimizer step; by default one micro-batch."""
    steps: int = 2
    """Optimizer steps in a round."""
    rounds: int = 5
    """Measured rounds, after one that is not counted."""
    threads: int = 1
    """Threads of each side on a CPU."""
    clock: Literal["wall", "cpu"] = "wall"
    """What speeds are told by; cpu is the processes' own time, for a machine with other work."""
    peak_tflops: float | None = None
    """The device's peak, for the MFU; by default that of the table of known devices in bf16."""
    json: Path | None = None
    """Also write the figures there."""


def run(options: TrainBenchmark) -> None:
    """Measures and prints a table for each dtype.

    Raises:
        UserError: options that cannot be measured.
        SystemExit: with 1 when the sides did not compute the same losses.
    """
    raise_if(_faults(options))
    device = chosen_device(options.device)
    # only an npu has fused kernels to switch off
    possible = tuple(side for side in SIDES if side != "ours-plain" or device == "npu")
    options = replace(options, device=device, sides=options.sides or possible)
    with TemporaryDirectory(prefix="qwen2-benchmark-") as name:
        folder = _weights(Path(name) / "hf", options)
        config = Qwen2Config.from_pretrained(folder)
        reports = []
        for dtype in options.dtypes:
            report = summarize(options, config, dtype, _measure(options, folder, dtype))
            _print(options, config, report)
            reports.append(report)
    if options.json:
        options.json.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
    if not all(report["same_losses"] for report in reports):
        raise SystemExit(1)


def summarize(
    options: TrainBenchmark,
    config: Qwen2Config,
    dtype: str,
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """The figures of one dtype.

    Args:
        options: their sides, clock and sizes count.
        config: the model.
        dtype: fp32 or bf16.
        answers: of every side, a round each: `wall` and `cpu` seconds, the `losses` of its steps,
            `peak_memory_bytes` and `device`.
    """
    tokens = options.steps * _global_batch_size(options) * options.seq_length
    per_token = train_flops_per_token(config, options.seq_length, config.vocab_size)
    flops = tokens * per_token
    first = [answer[options.clock] for answer in answers[options.sides[0]]]
    device_name = answers[options.sides[0]][0]["device"]
    peak = _peak_flops(options, device_name, dtype)
    rows = {}
    for side in options.sides:
        seconds = [answer[options.clock] for answer in answers[side]]
        rows[side] = {
            "seconds": seconds,
            "tokens_per_second": [tokens / s for s in seconds],
            "tflops_per_second": [flops / s / 1e12 for s in seconds],
            "mfu": [flops / s / peak for s in seconds] if peak else None,
            "peak_memory_bytes": max(answer["peak_memory_bytes"] for answer in answers[side]),
            "first_over_it": [b / a for a, b in zip(first, seconds, strict=True)],
            "losses": [loss for answer in answers[side] for loss in answer["losses"]],
            **energy_figures(answers[side], tokens),
        }
    difference = largest_difference(row["losses"] for row in rows.values())
    return {
        "dtype": dtype,
        "device": device_name,
        "clock": options.clock,
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()},
        "flops_per_token": per_token,
        "sides": rows,
        "largest_loss_difference": difference,
        "same_losses": difference <= LOSS_TOLERANCE[dtype],
    }


def _faults(options: TrainBenchmark) -> list[str]:
    faults = dtype_faults(options.dtypes) + side_faults(options.sides, SIDES)
    if len(set(options.sides)) != len(options.sides):
        faults.append(f"--sides {' '.join(options.sides)} names one twice.")
    counts = ("seq_length", "micro_batch_size", "steps", "rounds", "threads", "num_layers")
    faults += count_faults(options, *counts)
    if options.micro_batch_size >= 1:
        batch = _global_batch_size(options)
        if batch < 1 or batch % options.micro_batch_size:
            faults.append(
                f"--global-batch-size {batch} is not a multiple of --micro-batch-size "
                f"{options.micro_batch_size}."
            )
    if options.load and (options.config or options.num_layers):
        faults.append("--load brings its own shape; leave --config and --num-layers out.")
    if options.load and not (options.load / "config.json").is_file():
        faults.append(f"--load {options.load}: is no Hugging Face folder.")
    if options.peak_tflops is not None and not options.peak_tflops > 0:
        faults.append(f"--peak-tflops {options.peak_tflops} must be above 0.")
    return faults


def _global_batch_size(options: TrainBenchmark) -> int:
    size = options.global_batch_size
    return options.micro_batch_size if size is None else size


def shape(name: str | None, num_layers: int | None) -> Qwen2Config:
    """The model of a folder, a file or a published size; a small one without; of so many layers.

    Raises:
        UserError: there is none of that name.
    """
    if name is None:
        config = SMALL
    elif Path(name).exists():
        config = Qwen2Config.from_pretrained(name)
    else:
        config = Qwen2Config.named(name)
    return replace(config, num_layers=num_layers or config.num_layers)


def make_random_model(folder: Path, config: Qwen2Config, threads: int) -> Path:
    """Makes a Hugging Face folder of weights to begin a training at, in a process of its own."""
    folder.mkdir()
    raw = json.dumps(config.to_hugging_face(), indent=2) + "\n"
    (folder / "config.json").write_text(raw, encoding="utf-8")
    with Side("random_weights", [str(folder)], threads=threads) as maker:
        maker.read()
    return folder


def _weights(folder: Path, options: TrainBenchmark) -> Path:
    """What is trained: --load, or random weights, which are put into `folder`."""
    if options.load:
        return options.load
    config = shape(options.config, options.num_layers)
    if options.seq_length > config.max_position_embeddings:
        raise UserError(
            f"--seq-length {options.seq_length} is more than the model's "
            f"max_position_embeddings={config.max_position_embeddings}."
        )
    return make_random_model(folder, config, options.threads)


def _measure(options: TrainBenchmark, folder: Path, dtype: str) -> dict[str, list[dict[str, Any]]]:
    work = {
        "folder": str(folder),
        "device": options.device,
        "dtype": dtype,
        "seq_length": options.seq_length,
        "micro_batch_size": options.micro_batch_size,
        "global_batch_size": _global_batch_size(options),
        "max_steps": options.steps * (options.rounds + 1),
    }
    arguments = {side: [json.dumps({**work, "side": side})] for side in options.sides}
    with running("train_side", arguments, threads=options.threads) as sides:
        energy = SideEnergy(options.device)
        energy.begin()

        def measure(side: str) -> dict[str, Any]:
            answer = energy.ask(sides[side], options.steps)
            print(f"  {dtype} {side}: {answer[options.clock]:.2f} s", flush=True)
            return answer

        return interleaved(options.sides, options.rounds, measure)


def _peak_flops(options: TrainBenchmark, device_name: str, dtype: str) -> float | None:
    """The device's peak in bf16; None where no figure with a source is known."""
    if options.peak_tflops is not None:
        return options.peak_tflops * 1e12
    if dtype != "bf16" or options.device == "cpu":
        return None
    try:
        return find_device(device_name).peak_flops
    except UserError:
        return None


def _print(options: TrainBenchmark, config: Qwen2Config, report: Mapping[str, Any]) -> None:
    batch = _global_batch_size(options)
    threads = f", {options.threads} thread(s)" if options.device == "cpu" else ""
    print(
        f"\n{num_parameters(config):,} parameters, hidden {config.hidden_size}, "
        f"{config.num_layers} layers, vocabulary {config.vocab_size}; {report['dtype']}, "
        f"{batch} x {options.seq_length} tokens per step in micro-batches of "
        f"{options.micro_batch_size}; {report['device']}{threads}; {options.rounds} interleaved "
        f"rounds of {options.steps} steps, {options.clock} time, median (lowest-highest)\n"
    )
    first = options.sides[0]
    head = ("side", "tokens/s", "TFLOP/s", "MFU, %", "peak memory, MB", f"{first} over it")
    rows = []
    for side, row in report["sides"].items():
        cells = [side, spread(row["tokens_per_second"], ".0f")]
        cells.append(spread(row["tflops_per_second"], ".3f"))
        cells.append(spread([100 * x for x in row["mfu"]]) if row["mfu"] else "-")
        cells += [f"{row['peak_memory_bytes'] / 1e6:.0f}"]
        cells.append("1" if side == first else spread(row["first_over_it"], ".3f"))
        rows.append(cells)
    print(markdown.table(head, rows))
    if energy := energy_table(report["sides"]):
        print(f"\n{energy}")
    verdict = "the same" if report["same_losses"] else "NOT THE SAME: the speeds say nothing"
    print(
        f"\nlosses: {verdict} (largest relative difference {report['largest_loss_difference']:.1e})"
    )
