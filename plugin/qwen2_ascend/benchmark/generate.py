"""Generation on the CPU against transformers' generate, interleaved in one run."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2_ascend import markdown
from qwen2_ascend.benchmark.energy import SideEnergy, energy_figures, energy_table
from qwen2_ascend.benchmark.faults import count_faults, dtype_faults
from qwen2_ascend.benchmark.measure import spread
from qwen2_ascend.benchmark.sides import Side, running
from qwen2_ascend.errors import raise_if

SIDES = ("ours", "transformers")
TEXTS = (
    "def fibonacci(n):\n",
    "# Sorts a list in place with quicksort.\n",
    "Write a haiku about the sea:",
    "class Node:\n    def __init__(self, value):\n",
    "The capital of France is",
    "import torch\n\ndef train(model, data):\n",
    "1 + 1 =",
    "Once upon a time, in a land far away, there lived a",
)
"""Prompts of different lengths, repeated to fill a batch."""


@dataclass(frozen=True, kw_only=True)
class GenerateBenchmark:
    """Greedy generation against transformers' generate: the same weights, prompts and dtype.

    Each round runs both sides, one after the other and in turn first, on the CPU; ratios are of
    the pairs, and above 1 where this project is faster.
    """

    load: Path
    """Hugging Face folder."""
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    """fp32, bf16 or both."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Prompts at once."""
    new_tokens: int = 64
    """Tokens to generate for each prompt."""
    rounds: int = 5
    """Measured pairs, after one that is not counted."""
    threads: int = 1
    """Threads of each side."""
    json: Path | None = None
    """Also write the figures there."""


def run(options: GenerateBenchmark) -> None:
    """Measures and prints a table.

    Raises:
        UserError: options that cannot be measured.
    """
    faults = dtype_faults(options.dtypes)
    faults += count_faults(options, "batch_sizes", "new_tokens", "rounds", "threads")
    if not (options.load / "config.json").is_file():
        faults.append(f"--load {options.load}: is no Hugging Face folder.")
    raise_if(faults)
    rows = []
    for dtype in options.dtypes:
        rows += _measure(options, dtype)
    _print(options, rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def _measure(options: GenerateBenchmark, dtype: str) -> list[dict[str, Any]]:
    common = [str(options.load), dtype, str(options.new_tokens)]
    arguments = {name: [name, *common] for name in SIDES}
    with running("generate_side", arguments, threads=options.threads) as sides:
        energy = SideEnergy("cpu")
        energy.begin()
        return [_rounds(options, dtype, batch, sides, energy) for batch in options.batch_sizes]


def _rounds(
    options: GenerateBenchmark,
    dtype: str,
    batch: int,
    sides: dict[str, Side],
    energy: SideEnergy,
) -> dict[str, Any]:
    kept: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
    loads, differing = [], set()
    for i in range(options.rounds + 1):
        loads.append(os.getloadavg()[0])
        answers = {name: energy.ask(sides[name], batch) for name in SIDES[:: 1 if i % 2 else -1]}
        said = ", ".join(f"{name} {answers[name]['seconds']:.2f} s" for name in SIDES)
        print(f"  {dtype} batch {batch} round {i}: {said}", flush=True)
        differing.add(answers["ours"]["tokens"] != answers["transformers"]["tokens"])
        for name in SIDES if i else ():
            kept[name].append(answers[name])
    return {
        "dtype": dtype,
        "batch": batch,
        "seconds": {name: [answer["seconds"] for answer in kept[name]] for name in SIDES},
        "same_tokens": differing == {False},
        "load": loads[1:],
        "energy": {name: energy_figures(kept[name], batch * options.new_tokens) for name in SIDES},
    }


def _print(options: GenerateBenchmark, rows: list[dict[str, Any]]) -> None:
    print(
        f"\n{options.load.name}, {options.new_tokens} new tokens for each prompt, greedy, CPU, "
        f"{options.threads} thread(s); {options.rounds} interleaved pairs, "
        "median (lowest-highest)\n"
    )
    head = ("dtype", "batch", "ours, tokens/s", "transformers, tokens/s", "speed ratio of pairs")
    head += ("same tokens", "load of the machine")
    lines = []
    for row in rows:
        tokens = row["batch"] * options.new_tokens
        ours, theirs = (row["seconds"][name] for name in SIDES)
        cells = [row["dtype"], str(row["batch"])]
        cells += [spread([tokens / s for s in seconds]) for seconds in (ours, theirs)]
        cells.append(spread([b / a for a, b in zip(ours, theirs, strict=True)]))
        cells += ["yes" if row["same_tokens"] else "no", spread(row["load"])]
        lines.append(cells)
    print(markdown.table(head, lines))
    for row in rows:
        if energy := energy_table(row["energy"]):
            print(f"\n{row['dtype']}, batch {row['batch']}\n\n{energy}")
