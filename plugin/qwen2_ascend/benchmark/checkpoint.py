"""Saving and loading a training state: against megatron-core's own way and a plain torch.save."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import tyro

from qwen2_ascend import markdown
from qwen2_ascend.benchmark.faults import count_faults, side_faults
from qwen2_ascend.benchmark.measure import PeakMemory, spread
from qwen2_ascend.benchmark.sides import RankedSide, interleaved
from qwen2_ascend.benchmark.train import make_random_model, shape
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.planning.parameters import num_parameters

SIDES = ("ours", "ours-async", "ours-torch", "dist_checkpointing", "torch.save")
RANKED_SIDES = ("ours", "ours-async", "ours-torch", "dist_checkpointing")
"""Those that can be measured on several ranks."""
BYTES_PER_WEIGHT = {"fp32": 12, "bf16": 14}
"""Bytes of a weight and AdamW's two moments; bf16 weights have fp32 ones too."""


@dataclass(frozen=True, kw_only=True)
class CheckpointBenchmark:
    """Saves and loads the state of a training, on the CPU, each way in processes of its own.

    ours: this project's checkpoint in torch_dist; ours-async: the same with --async-save, of which
    the time that training waits is measured; ours-torch: in Megatron's mp_rank files;
    dist_checkpointing: megatron-core's GPTModel, optimizer and dist_checkpointing; torch.save: one
    file of a transformers model's and its optimizer's state_dict. Every way ends with what it wrote
    on the disk, loads it again while the system still has it in memory, and has to arrive at the
    same weights and moments.

    With several processes all are data-parallel with the distributed optimizer, and
    dist_checkpointing is the fully parallel one (dp_reshardable, its fastest).
    """

    config: Annotated[str | None, tyro.conf.arg(metavar="DIR|SIZE")] = None
    """A Hugging Face folder, a config.json or a published size; by default a small model (hidden
    512, 8 layers, vocabulary 8192)."""
    num_layers: int | None = None
    """The number of layers, instead of the model's own."""
    sides: tuple[str, ...] = ()
    """Some of ours, ours-async, ours-torch, dist_checkpointing and torch.save; the others are
    compared with the first. By default all that can run on so many processes."""
    processes: int = 1
    """Data-parallel ranks of each way."""
    dtype: str = "fp32"
    """fp32, or bf16 with fp32 main weights; torch.save's are fp32 either way."""
    rounds: int = 3
    """Measured rounds, after one that is not counted."""
    threads: int = 1
    """Threads of each process."""
    directory: Path | None = None
    """Where to work: a folder on the disk to be measured; the system's temporary one by default."""
    json: Path | None = None
    """Also write the figures there."""


def run(options: CheckpointBenchmark) -> None:
    """Measures and prints a table.

    Raises:
        UserError: options that cannot be measured, or the disk has no room.
        SystemExit: with 1 when a side did not get back what it had saved.
    """
    options = replace(options, sides=options.sides or _possible_sides(options))
    raise_if(_faults(options))
    config = shape(options.config, options.num_layers)
    with TemporaryDirectory(dir=options.directory, prefix="qwen2-benchmark-") as name:
        folder = Path(name)
        # the model, and a checkpoint beside the one that replaces it
        needed = num_parameters(config) * (4 + 2 * BYTES_PER_WEIGHT[options.dtype])
        if shutil.disk_usage(folder).free < needed:
            raise UserError(
                f"{folder}: needs {needed / 1e9:.1f} GB free; name another --directory."
            )
        make_random_model(folder / "hf", config, options.threads)
        report = summarize(options, _measure(options, folder))
    _print(options, config, report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if not all(row["intact"] for row in report.values()):
        raise SystemExit(1)


def summarize(
    options: CheckpointBenchmark, answers: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """The figures.

    Args:
        options: their sides count.
        answers: of every side, a round each: `num_bytes` on the disk, `intact`, and of `save` and
            `load` the `seconds` and `memory_bytes` that were needed besides the training state.
    """
    first = answers[options.sides[0]]
    return {
        side: {
            "num_bytes": answers[side][0]["num_bytes"],
            "rank_bytes": answers[side][0].get("rank_bytes", {}),
            "intact": all(answer["intact"] for answer in answers[side]),
            **{action: _summary(action, first, answers[side]) for action in ("save", "load")},
        }
        for side in options.sides
    }


def _summary(
    action: str, first: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    seconds = [answer[action]["seconds"] for answer in answers]
    return {
        "seconds": seconds,
        "bytes_per_second": [a["num_bytes"] / s for a, s in zip(answers, seconds, strict=True)],
        "first_over_it": [
            s / mine[action]["seconds"] for mine, s in zip(first, seconds, strict=True)
        ],
        "memory_bytes": max(answer[action]["memory_bytes"] for answer in answers),
    }


def _measure(options: CheckpointBenchmark, folder: Path) -> dict[str, list[dict[str, Any]]]:
    module, processes = "checkpoint_side", options.processes
    with ExitStack() as stack:
        sides: dict[str, RankedSide] = {}
        for name in options.sides:
            words = [name, str(folder / "hf"), options.dtype]
            side = RankedSide(module, words, threads=options.threads, processes=processes)
            sides[name] = stack.enter_context(side)
            side.read()

        def measure(side: str) -> dict[str, Any]:
            target = folder / "checkpoint"
            try:
                answer = {"save": _watched(sides[side], "save", target)}
                rank_bytes = _rank_bytes(target)
                answer["load"] = _watched(sides[side], "load", target)
            finally:
                shutil.rmtree(target, ignore_errors=True)
            told = ", ".join(f"{key} {value['seconds']:.2f} s" for key, value in answer.items())
            print(f"  {side}: {told}", flush=True)
            sizes = {"num_bytes": answer["save"]["num_bytes"], "rank_bytes": rank_bytes}
            return {**answer, **sizes, "intact": answer["load"]["intact"]}

        return interleaved(options.sides, options.rounds, measure)


def _watched(side: RankedSide, action: str, target: Path) -> dict[str, Any]:
    """What the slowest rank said, and the anonymous memory of the rank that took most, at its peak
    above what it held before."""
    memories = [PeakMemory(pid) for pid in side.pids]
    before = [memory.sample() for memory in memories]
    with ExitStack() as stack:
        for memory in memories:
            stack.enter_context(memory)
        answers = side.ask([action, str(target)])
    rises = [memory.num_bytes - held for memory, held in zip(memories, before, strict=True)]
    slowest = max(answers, key=lambda answer: answer["seconds"])
    intact = all(answer.get("intact", True) for answer in answers)
    return {**slowest, "intact": intact, "memory_bytes": max(*rises, 0)}


def _rank_bytes(folder: Path) -> dict[str, int]:
    """What each rank wrote of a torch_dist folder, by rank."""
    found: dict[str, int] = {}
    for path in folder.rglob("__*_*.distcp"):
        rank = path.name.split("_")[2]
        found[rank] = found.get(rank, 0) + path.stat().st_size
    return dict(sorted(found.items(), key=lambda item: int(item[0])))


def _possible_sides(options: CheckpointBenchmark) -> tuple[str, ...]:
    return SIDES if options.processes == 1 else RANKED_SIDES


def _faults(options: CheckpointBenchmark) -> list[str]:
    faults = []
    if options.dtype not in BYTES_PER_WEIGHT:
        faults.append(f"--dtype {options.dtype} is not fp32 or bf16.")
    faults += side_faults(options.sides, SIDES)
    if alone := sorted(set(options.sides) & set(SIDES) - set(_possible_sides(options))):
        faults.append(f"--processes {options.processes}: {', '.join(alone)} runs on one only.")
    return faults + count_faults(options, "processes", "rounds", "threads", "num_layers")


def _print(options: CheckpointBenchmark, config: Qwen2Config, report: Mapping[str, Any]) -> None:
    print(
        f"\n{num_parameters(config):,} parameters with AdamW's state, {options.dtype}, "
        f"{options.processes} CPU process(es); {options.rounds} interleaved rounds, "
        "median (lowest-highest)\n"
    )
    first = options.sides[0]
    head = ("side", "GB", "", "s", "GB/s", f"{first} over it", "memory besides, MB", "intact")
    rows = []
    for side, row in report.items():
        for action in ("save", "load"):
            of = row[action]
            cells = [side, f"{row['num_bytes'] / 1e9:.2f}", action, spread(of["seconds"])]
            cells.append(spread([x / 1e9 for x in of["bytes_per_second"]]))
            cells.append("1" if side == first else spread(of["first_over_it"]))
            cells += [f"{of['memory_bytes'] / 1e6:.0f}", "yes" if row["intact"] else "no"]
            rows.append(cells)
    print(markdown.table(head, rows))
    for side, row in report.items():
        if len(row["rank_bytes"]) > 1:
            megabytes = ", ".join(f"{size / 1e6:.1f}" for size in row["rank_bytes"].values())
            print(f"{side}: MB written by each rank: {megabytes}")
