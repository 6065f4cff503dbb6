"""What --o2-gradient and --o2-optimizer cost in precision, on a small model; docs/benchmarks.md.

    OMP_NUM_THREADS=1 PYTHONPATH=plugin:tests python -m training.half_state [--steps N]

It trains a small Qwen2 on the bytes of Python's standard library, several times on the same data
from the same weights, and prints the loss of the last tenth of the steps and of validation data.
Each step adds up the gradients of two micro-batches. A second seed gives the bf16 run its data in
another order, which shows how much of a difference is chance.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import tempfile
from pathlib import Path

import numpy as np

from distributed.harness import Run
from distributed.trainings import join
from helpers import tiny_config

PRECISIONS = {
    "fp32": "",
    "bf16": "--bf16",
    "bf16, --o2-gradient": "--bf16 --o2-gradient",
    "bf16, --o2-optimizer": "--bf16 --o2-optimizer",
    "bf16, both": "--bf16 --o2-gradient --o2-optimizer",
}
RUNS = [
    ("fp32", 0.95, 0),
    ("bf16", 0.95, 0),
    ("bf16", 0.95, 1),
    ("bf16", 0.95, 2),
    ("bf16, --o2-gradient", 0.95, 0),
    ("bf16, --o2-optimizer", 0.95, 0),
    ("bf16, both", 0.95, 0),
    ("bf16, both", 0.95, 1),
    ("bf16, both", 0.95, 2),
    ("bf16", 0.999, 0),
    ("bf16, --o2-optimizer", 0.999, 0),
    ("bf16, both", 0.999, 0),
]
"""Precision, --adam-beta2 and seed of the data."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, nargs=2, default=(0, len(RUNS)), help="from, to")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        _prepare(Path(folder))
        print(
            "| precision | --adam-beta2 | seed | last tenth | validation |\n|---|---|---|---|---|"
        )
        for name, beta2, seed in RUNS[slice(*chosen.rows)]:
            flags = PRECISIONS[name]
            losses, validation = trained(Path(folder), flags, beta2, seed, chosen.steps)
            last = np.mean(losses[-max(chosen.steps // 10, 1) :])
            print(f"| {name} | {beta2} | {seed} | {last:.4f} | {validation:.4f} |", flush=True)


def _prepare(folder: Path) -> None:
    """The bytes of the standard library's modules as documents, and a model's config."""
    from qwen2_ascend.data.indexed import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{folder}/corpus.bin", dtype=np.uint16)
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        data = path.read_bytes()[:40_000]
        builder.add_document([*data, 0], [len(data) + 1])
    builder.finalize(f"{folder}/corpus.idx")
    config = tiny_config(num_layers=2, tie_word_embeddings=True, dtype="bf16").to_hugging_face()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def trained(
    folder: Path, flags: str, beta2: float, seed: int, num_steps: int
) -> tuple[list[float], float]:
    """(the loss of every step, the validation loss at the end)."""
    from qwen2_ascend import runtime
    from qwen2_ascend.training.plan import make_plan
    from qwen2_ascend.training.pretrain import prepare
    from qwen2_ascend.training.settings import parse, validate

    words = (
        f"--config {folder}/config.json --data-path {folder}/corpus --split 95,5,0 --seed {seed} "
        f"--seq-length 32 --micro-batch-size 4 --global-batch-size 8 --train-iters {num_steps} "
        f"--lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine --lr-warmup-iters {num_steps // 20} "
        f"--weight-decay 0.1 --adam-beta2 {beta2} --eval-iters 10 --device cpu {flags}"
    )
    plan = make_plan(parse(words.split()))
    running = runtime.start("cpu")
    join(Run(running, folder), plan, validate)
    running.seed_all(1)  # the weights are the same whatever the data's seed
    run = prepare(plan, running)
    batches = run.batches()
    losses = [run.step(batches).loss for _ in range(num_steps)]
    return losses, run.evaluate()


if __name__ == "__main__":
    main()
