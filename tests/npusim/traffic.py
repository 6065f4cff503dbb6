"""What a training step moves between cards, against what its layout has to move at least.

    PYTHONPATH=tests python -m npusim.traffic           # the table of docs/benchmarks.md
    PYTHONPATH=tests python -m npusim.traffic --write   # goldens/traffic.json anew

Bytes are what the cards together send when each collective is a ring: n ranks that reduce x bytes
to everyone send 2 (n - 1) x in all, to gather or to scatter n parts of x bytes n (n - 1) x.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npusim.run import on_cards
from qwen2_ascend import markdown

if TYPE_CHECKING:
    from npusim.cards import Call
    from qwen2_ascend.runtime import Runtime

GOLDEN = Path(__file__).parent / "goldens" / "traffic.json"
TP2, PP2 = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A layout whose traffic is measured: a bf16 model of 4 layers, 2 micro-batches per rank."""

    cards: int
    flags: str
    tp: int = 1
    pp: int = 1
    sequence_parallel: bool = False

    @property
    def dp(self) -> int:
        return self.cards // (self.tp * self.pp)


LAYOUTS = {
    "TP2": Layout(cards=2, flags=TP2, tp=2),
    "TP2 SP": Layout(cards=2, flags=f"{TP2} --sequence-parallel", tp=2, sequence_parallel=True),
    "PP2": Layout(cards=2, flags=PP2, pp=2),
    "DP2": Layout(cards=2, flags=""),
    "DP2 distributed optimizer": Layout(cards=2, flags="--use-distributed-optimizer"),
    "TP2 PP2": Layout(cards=4, flags=f"{TP2} {PP2}", tp=2, pp=2),
}
MICRO_BATCHES, MICRO_BATCH, LENGTH = 2, 2, 24
ACTIVATION, GRADIENT, WEIGHT = 2, 4, 2
"""Bytes of a number: bf16, and gradients that are summed in fp32."""


def minimum(layout: Layout) -> int:
    """Bytes that all cards together must send in a step, with gradients summed in fp32.

    From what each cut makes a sum or a copy over ranks, whatever calls a framework makes of it; the
    planner's list of calls is not looked at, and tests hold that list to what was recorded.

    TP: the output of attention and of the MLP is a sum over ranks, and so is each one's gradient:
    4 sums of `[s, b, h]` per layer; the embedding's output and the gradient of the last layer's
    input, 2 more. The loss is 3 numbers per token: the largest logit, the sum of exponentials, the
    label's own. With sequence parallelism each sum is a scatter and a gather, as many bytes, and
    the norms' gradients are sums over ranks too.
    PP: the hidden states at each boundary, and their gradient, for every rank that needs them all.
    DP: every gradient is summed; a rank that updates a part of the weights only needs the sum of
    that part, and gives away its new weights in bf16.
    """
    from helpers import tiny_config
    from qwen2_ascend.planning.parameters import num_parameters

    config = tiny_config()
    tokens = MICRO_BATCH * LENGTH
    hidden = tokens * config.hidden_size * ACTIVATION
    per_micro_batch = 0
    if layout.tp > 1:
        sums = (4 * config.num_layers + 2) * hidden + 3 * tokens * 4
        per_micro_batch += 2 * (layout.tp - 1) * sums
    per_micro_batch += 2 * (layout.pp - 1) * hidden * (1 if layout.sequence_parallel else layout.tp)
    total = MICRO_BATCHES * layout.dp * per_micro_batch
    if layout.sequence_parallel:
        norms = (2 * config.num_layers + 1) * config.hidden_size
        total += 2 * (layout.tp - 1) * norms * GRADIENT
    if layout.dp > 1:
        gathered = WEIGHT if "distributed-optimizer" in layout.flags else GRADIENT
        total += (layout.dp - 1) * num_parameters(config) * (GRADIENT + gathered)
    return total


def sent_bytes(call: Call) -> float:
    """What this rank sends in a ring, or to its peer."""
    n, size = call.num_ranks, call.num_bytes
    if call.op == "AllReduce":
        return 2 * (n - 1) / n * size
    if call.op in ("AllGather", "ReduceScatter", "AllGatherV", "ReduceScatterV"):
        return (n - 1) * size
    return size if call.op in ("Send", "Broadcast") and n > 1 else 0


def measure(runtime: Runtime, folder: Path, layout: Layout) -> dict[str, Any]:
    """One step's traffic: the calls and bytes of all ranks, and the first rank's calls by kind."""
    import torch

    from distributed.harness import Run
    from distributed.train_worker import start, steps
    from npusim.cards import hccl_calls

    size = MICRO_BATCHES * MICRO_BATCH * layout.dp
    training = start(
        Run(runtime, folder),
        f"--mock-data --seq-length {LENGTH} --micro-batch-size {MICRO_BATCH} --device npu --bf16 "
        f"--global-batch-size {size} --train-iters 3 --lr 1e-3 --num-workers 0 {layout.flags}",
    )
    steps(training, 1)
    before = len(hccl_calls())
    steps(training, 1)
    calls = hccl_calls()[before:]
    calls = [call for call in calls if call.num_ranks > 1]
    kinds = Counter(f"{call.op} {call.dtype} {call.count}" for call in calls)
    own = (len(calls), sum(map(sent_bytes, calls)), kinds)
    of_ranks: list[Any] = [None] * runtime.world_size
    torch.distributed.all_gather_object(of_ranks, own)
    return {
        "calls": sum(number for number, _, _ in of_ranks),
        "bytes": round(sum(sent for _, sent, _ in of_ranks)),
        "first rank": dict(sorted(of_ranks[0][2].items())),
    }


# --- the table ------------------------------------------------------------------------------------


def main() -> None:
    """Measures every layout, a torchrun per number of cards, and prints or writes."""
    parser = argparse.ArgumentParser(prog="npusim.traffic", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write goldens/traffic.json")
    parser.add_argument("--inside", metavar="FOLDER", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        _inside(options.inside)
        return
    found = {}
    for cards in sorted({layout.cards for layout in LAYOUTS.values()}):
        found |= on_cards(__file__, cards)
    found = {name: found[name] for name in LAYOUTS}
    if options.write:
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


def table(found: dict[str, Any]) -> str:
    """Markdown: measured, the minimum, and what is above it."""
    rows = []
    for name, numbers in found.items():
        sent, least = numbers["bytes"], minimum(LAYOUTS[name])
        compared = (f"{sent:,}", f"{least:,}", f"{sent - least:,}", f"{sent / least:.3f}")
        rows.append((name, str(numbers["calls"]), *compared))
    return markdown.table(("layout", "calls", "bytes", "at least", "above", "ratio"), rows)


def _inside(folder: Path) -> None:
    from qwen2_ascend import runtime as runtimes

    runtime = runtimes.start("npu")
    layouts = {
        name: layout for name, layout in LAYOUTS.items() if layout.cards == runtime.world_size
    }
    found = {name: measure(runtime, folder, layout) for name, layout in layouts.items()}
    if runtime.rank == 0:
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    runtime.close()


if __name__ == "__main__":
    main()
