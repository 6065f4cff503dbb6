"""Attention by itself, forward and backward: our operators against torch's SDPA."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from qwen2_ascend import markdown
from qwen2_ascend.benchmark.faults import chosen_device, count_faults, dtype_faults, side_faults
from qwen2_ascend.benchmark.measure import largest_difference, spread
from qwen2_ascend.benchmark.sides import interleaved, running
from qwen2_ascend.errors import raise_if
from qwen2_ascend.planning.flops import attention_flops

SIDES = ("ours", "unfused", "sdpa")
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest relative difference of the sums that two sides compute from the same numbers."""


@dataclass(frozen=True, kw_only=True)
class AttentionBenchmark:
    """Causal attention with grouped queries, forward and backward, on one device.

    ours: what the layers call there, torch_npu's fused kernel on an npu, SDPA without copies on
    other devices. unfused: the same by scores, softmax and context. sdpa: torch's
    scaled_dot_product_attention as transformers calls it. All get the same numbers, and the command
    fails when they do not compute the same. The shape is that of the 0.5B.
    """

    seq_lengths: tuple[int, ...] = (512, 2048)
    """Tokens."""
    batch_size: int = 1
    """Sequences."""
    num_attention_heads: int = 14
    """Query heads."""
    num_query_groups: int = 2
    """Key/value heads."""
    kv_channels: int = 64
    """Width of a head."""
    sides: tuple[str, ...] = SIDES
    """Some of ours, unfused and sdpa; the others are compared with the first."""
    device: Literal["auto", "npu", "cuda", "cpu"] = "auto"
    """auto takes npu, else cuda, else cpu."""
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    """fp32, bf16 or both."""
    steps: int = 5
    """Forward and backward passes in a round."""
    rounds: int = 5
    """Measured rounds, after one that is not counted."""
    threads: int = 1
    """Threads of each side on a CPU."""
    clock: Literal["wall", "cpu"] = "wall"
    """What speeds are told by; cpu is the processes' own time, for a machine with other work."""
    json: Path | None = None
    """Also write the figures there."""


def run(options: AttentionBenchmark) -> None:
    """Measures and prints a table.

    Raises:
        UserError: options that cannot be measured.
        SystemExit: with 1 when the sides did not compute the same.
    """
    raise_if(_faults(options))
    options = replace(options, device=chosen_device(options.device))
    reports = _measure(options)
    _print(options, reports)
    if options.json:
        options.json.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
    if not all(report["same_results"] for report in reports):
        raise SystemExit(1)


def _measure(options: AttentionBenchmark) -> list[dict[str, Any]]:
    """A report of each dtype and length."""
    reports = []
    arguments = {side: [side, options.device] for side in options.sides}
    with running("attention_side", arguments, threads=options.threads) as sides:
        for dtype, seq_length in product(options.dtypes, options.seq_lengths):
            question = _question(options, dtype, seq_length)
            answers = interleaved(
                options.sides, options.rounds, lambda side, q=question: sides[side].ask(q)
            )
            reports.append(summarize(options, dtype, seq_length, answers))
            print(f"  {dtype}, {seq_length} tokens: measured", flush=True)
    return reports


def summarize(
    options: AttentionBenchmark,
    dtype: str,
    seq_length: int,
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """The figures of one dtype and length.

    Args:
        options: their sides, clock and shape count.
        dtype: fp32 or bf16.
        seq_length: tokens.
        answers: of every side, a round each: `wall` and `cpu` seconds, `peak_memory_bytes`,
            `device`, and `sums` of the context and of the three gradients.
    """
    per_token = attention_flops(seq_length, options.num_attention_heads, options.kv_channels)
    # backward is twice forward; what a flash kernel computes again in it does not count
    flops = options.steps * options.batch_size * seq_length * 3 * per_token
    first = answers[options.sides[0]]
    rows = {}
    for side in options.sides:
        seconds = [answer[options.clock] for answer in answers[side]]
        rows[side] = {
            "seconds": seconds,
            "tflops_per_second": [flops / s / 1e12 for s in seconds],
            "peak_memory_bytes": max(answer["peak_memory_bytes"] for answer in answers[side]),
            "first_over_it": [b / a[options.clock] for a, b in zip(first, seconds, strict=True)],
        }
    compared = (first, *(answers[side] for side in options.sides))
    difference = largest_difference([x for one in of for x in one["sums"]] for of in compared)
    return {
        "dtype": dtype,
        "seq_length": seq_length,
        "device": first[0]["device"],
        "clock": options.clock,
        "sides": rows,
        "largest_difference": difference,
        "same_results": difference <= TOLERANCE[dtype],
    }


def _question(options: AttentionBenchmark, dtype: str, seq_length: int) -> dict[str, Any]:
    shape = [seq_length, options.batch_size]
    return {
        "query_shape": [*shape, options.num_attention_heads, options.kv_channels],
        "key_shape": [*shape, options.num_query_groups, options.kv_channels],
        "dtype": dtype,
        "steps": options.steps,
    }


def _faults(options: AttentionBenchmark) -> list[str]:
    faults = dtype_faults(options.dtypes) + side_faults(options.sides, SIDES)
    shape = ("seq_lengths", "batch_size", "num_attention_heads", "num_query_groups", "kv_channels")
    faults += count_faults(options, *shape, "steps", "rounds", "threads")
    if not options.sides:
        faults.append("--sides: name at least one.")
    groups = options.num_query_groups
    if groups >= 1 and options.num_attention_heads % groups:
        faults.append(
            f"--num-attention-heads {options.num_attention_heads} is not a multiple of "
            f"--num-query-groups {groups}."
        )
    return faults


def _print(options: AttentionBenchmark, reports: Sequence[Mapping[str, Any]]) -> None:
    threads = f", {options.threads} thread(s)" if options.device == "cpu" else ""
    print(
        f"\n{options.batch_size} sequence(s), {options.num_attention_heads} query heads and "
        f"{options.num_query_groups} key/value heads of {options.kv_channels}, causal, forward and "
        f"backward; {reports[0]['device']}{threads}; {options.rounds} interleaved rounds of "
        f"{options.steps}, {options.clock} time, median (lowest-highest)\n"
    )
    first = options.sides[0]
    head = ["dtype", "tokens", "side", "ms", "TFLOP/s", "peak memory, MB", f"{first} over it"]
    rows = []
    for report in reports:
        for side, row in report["sides"].items():
            cells = [report["dtype"], str(report["seq_length"]), side]
            cells.append(spread([1e3 * s / options.steps for s in row["seconds"]]))
            cells.append(spread(row["tflops_per_second"], ".3f"))
            cells += [f"{row['peak_memory_bytes'] / 1e6:.0f}"]
            cells.append("1" if side == first else spread(row["first_over_it"], ".3f"))
            cells.append("yes" if report["same_results"] else "no")
            rows.append(cells)
    print(markdown.table([*head, "same results"], rows))
