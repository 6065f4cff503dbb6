"""A PNG of the memory per rank: the best layouts beside each other, and the stages of the first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen2_ascend.figures import new_figure, png, without_box
from qwen2_ascend.planning.devices import GB
from qwen2_ascend.planning.memory import Memory, stage_memory
from qwen2_ascend.planning.report import Result, best_of_each_shape, recompute_words
from qwen2_ascend.planning.search import Plan

PARTS = {
    "weights": "#4878a8",
    "gradients": "#7fb2d8",
    "optimizer": "#b5d3e9",
    "activations": "#e08a3c",
    "temporary": "#f2bd85",
    "logits": "#c4534a",
    "buffers": "#9a9a9a",
}
"""Fields of Memory, in the order they are stacked, and their colours."""
MAX_LAYOUTS, MAX_STAGES = 10, 16


def draw(result: Result, path: Path) -> None:
    """Writes the PNG; needs matplotlib."""
    plans = best_of_each_shape(result.plans)[:MAX_LAYOUTS]
    best = plans[0].cut
    columns = 2 if best.pp > 1 else 1
    figure = new_figure(7.5 + 4.5 * (columns - 1), 2.2 + 0.42 * len(plans))
    axes = figure.subplots(1, columns, squeeze=False, width_ratios=[1.6, 1.0][:columns])
    _layouts(axes[0][0], result, plans)
    if best.pp > 1:
        _stages(axes[0][1], result, plans[0])
    without_box(*axes[0])
    machine = result.machine
    figure.suptitle(
        f"{result.model} on {machine.num_devices} x {machine.device.name}, "
        f"{result.job.seq_length} tokens, {result.job.global_batch_size} sequences per step",
        fontsize=12,
    )
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    path.write_bytes(png(figure))


def _layouts(axes: Any, result: Result, plans: list[Plan]) -> None:
    places = range(len(plans))
    _stack(axes.barh, list(places), [plan.memory for plan in plans], "left")
    _limits(axes.axvline, result)
    top = max(result.machine.device.memory, *(plan.memory.total for plan in plans)) / GB
    for place, plan in zip(places, plans, strict=True):
        total = plan.memory.total / GB
        told = f"{plan.time.total:.3g} s" if plan.fits else "does not fit"
        axes.text(
            total + 0.015 * top,
            place,
            f"{total:.1f} GB, {told}",
            va="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )
    axes.set_yticks(list(places), [_name(plan) for plan in plans], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, top * 1.22)
    axes.set_xlabel("GB of the fullest card")
    axes.set_title("best layouts; predicted seconds per step", fontsize=10)


def _stages(axes: Any, result: Result, plan: Plan) -> None:
    """Every stage of one plan, or evenly chosen ones."""
    pp = plan.cut.pp
    count = min(pp, MAX_STAGES)
    stages = sorted({round(i * (pp - 1) / (count - 1)) for i in range(count)})
    memories = [stage_memory(plan.cut, stage) for stage in stages]
    places = list(range(len(stages)))
    _stack(axes.bar, places, memories, "bottom")
    _limits(axes.axhline, result)
    axes.set_xticks(places, [str(stage) for stage in stages], fontsize=8)
    axes.set_xlabel("pipeline stage")
    axes.set_ylabel("GB per card")
    axes.set_title(f"stages of {plan.cut.label()}", fontsize=10)


def _stack(bar: Any, places: list[int], memories: list[Memory], start: str) -> None:
    ends = [0.0] * len(places)
    for part, colour in PARTS.items():
        sizes = [getattr(memory, part) / GB for memory in memories]
        bar(places, sizes, 0.72, color=colour, label=part, **{start: ends})
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]


def _limits(line: Any, result: Result) -> None:
    machine = result.machine
    line(machine.device.memory / GB, color="black", linewidth=1, label="a card's memory")
    line(
        machine.usable_memory / GB, color="black", linewidth=1, linestyle="--", label="usable share"
    )


def _name(plan: Plan) -> str:
    cut = plan.cut
    words = [f"micro-batch {cut.micro_batch_size}"]
    words += ["SP"] * cut.sequence_parallel + ["dist-opt"] * cut.distributed_optimizer
    words += [f"{recompute_words(cut)} recompute"] * (recompute_words(cut) != "-")
    return f"{cut.label()}\n{', '.join(words)}"
