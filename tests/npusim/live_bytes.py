"""Live bytes of a rank with each option that saves memory: the table of docs/benchmarks.md.

    PYTHONPATH=plugin:tests python -m npusim.live_bytes

torch_npu's own caching allocator counts what tensors ask for on four simulated cards, between two
steps and at the fullest moment of a step. Its blocks may be larger. What HCCL and CANN take on a
device is not in it, nor is the causal mask of 4.2 MB that a process makes once.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from helpers import tiny_config

TP, DP, LENGTH = 2, 2, 512
LAYOUT = (
    "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer --bf16 "
    f"--mock-data --seq-length {LENGTH} --micro-batch-size 1 --global-batch-size 4 "
    "--train-iters 3 --lr 1e-3 --device npu --num-workers 0"
)
MODEL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 256,
    "ffn_hidden_size": 1376,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "kv_channels": 32,
    "vocab_size": 8192,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": True,
}
"""The proportions of the 0.5B's layers."""
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
OPTIONS = (
    "",
    "--reuse-fp32-param",
    "--o2-gradient",
    "--o2-optimizer",
    "--o2-gradient --o2-optimizer",
    "--o2-gradient --o2-optimizer --reuse-fp32-param",
    "--swap-attention",
    "--recompute-activation-function",
    "--recompute-norm",
    "--recompute-granularity selective",
    FULL,
    "--cross-entropy-chunk-size 128",
    "--optimizer-cpu-offload --optimizer-offload-fraction 0.5",
    "--optimizer-cpu-offload",
)
CAUSAL_MASK = 2048 * 2048
ALLOCATOR = {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:False"}
"""The simulated runtime reserves no addresses."""


class Bytes(NamedTuple):
    """The bytes of one rank."""

    weights: int
    """Elements of all weights."""
    updated: int
    """Elements that this rank updates."""
    on_host: int
    """The number of those that the host updates."""
    at_rest: int
    """Bytes alive between two steps."""
    peak: int
    """Bytes at the fullest moment of a step."""


def measured(run: Any, flags: str) -> Bytes:
    """The second step of a run; the first makes Adam's state."""
    import torch

    from distributed.train_worker import len_of, start, steps, weights
    from qwen2_ascend.training.optimizer import state_slices

    before = alive()
    training = start(run, f"{LAYOUT} {flags}", load=_folder(run))
    steps(training, 1)
    at_rest = alive()
    torch.npu.reset_peak_memory_stats()
    steps(training, 1)
    peak = requested("peak")
    slices = list(state_slices(training.optimizer).values())
    on_host = [s for s in slices if s.tensors["exp_avg"].device.type == "cpu"]
    return Bytes(
        weights=len_of(weights(training).values()),
        updated=sum(s.stop - s.start for s in slices),
        on_host=sum(s.stop - s.start for s in on_host),
        at_rest=at_rest - before,
        peak=peak - before,
    )


class Planned(NamedTuple):
    """What the planner says of rank 0; neither HCCL's memory nor the causal mask is in it."""

    at_rest: int
    peak: int


def planned(flags: str) -> Planned:
    """What is planned with an option, rounded up to no whole tensor of what the host keeps."""
    from qwen2_ascend.planning.memory import HCCL_BYTES, communicators, stage_memory
    from qwen2_ascend.training.planned import as_run_layout
    from qwen2_ascend.training.settings import parse

    settings = parse(f"{LAYOUT} {flags} --config 0.5B".split())
    cut = as_run_layout(settings, tiny_config(**MODEL), TP * DP, "npu")
    memory = stage_memory(cut, 0)
    elsewhere = communicators(cut) * HCCL_BYTES + CAUSAL_MASK
    rest = memory.at_rest + memory.buffers - elsewhere
    return Planned(rest, memory.total - elsewhere)


def requested(when: str) -> int:
    """Bytes that tensors asked for; what the allocator dealt out may be 1 MB more for each."""
    import torch

    return torch.npu.memory_stats()[f"requested_bytes.all.{when}"]


def alive() -> int:
    """Bytes now, without blocks that wait for another stream to have used them."""
    import torch

    gc.collect()
    torch.npu.synchronize()
    torch.npu.empty_cache()
    return requested("current")


def _folder(run: Any) -> Path:
    """Weights of the model, written by the first rank that asks."""
    import torch

    from helpers import make_tiny_hugging_face_folder

    folder = run.folder / "live-bytes"
    if run.runtime.rank == 0 and not folder.exists():
        make_tiny_hugging_face_folder(folder, tiny_config(**MODEL))
    torch.distributed.barrier()
    return folder


def rows() -> Iterator[tuple[str, Bytes]]:
    """Every option on simulated cards, as rank 0 sees it; each is said when it is known."""
    from npusim.env import environment
    from npusim.run import command

    variables = environment(num_devices=TP * DP)
    variables.pop("PYTORCH_NO_NPU_MEMORY_CACHING")
    with tempfile.TemporaryDirectory() as folder:
        words = command([__file__, folder], torchrun=f"--standalone --nproc-per-node {TP * DP}")
        with subprocess.Popen(
            words, env=variables | ALLOCATOR, stdout=subprocess.PIPE, text=True
        ) as ranks:
            assert ranks.stdout is not None
            for line in ranks.stdout:
                if line.startswith("{"):
                    told = json.loads(line)
                    yield told.pop("flags"), Bytes(**told)
        assert ranks.returncode == 0, f"exit status {ranks.returncode}"


def _rank(folder: str) -> None:
    """What each rank does."""
    from distributed.harness import Run
    from qwen2_ascend import runtime

    run = Run(runtime.start("npu", timeout_seconds=300), Path(folder))
    measured(run, "")  # what a process makes once, such as the causal mask, is not a run's
    for flags in OPTIONS:
        found = measured(run, flags)
        if run.runtime.rank == 0:
            print(json.dumps({"flags": flags, **found._asdict()}), flush=True)


def main() -> None:
    """Prints the table."""
    print("| option | at rest, MB | difference | peak, MB | difference |\n|---|---|---|---|---|")
    first = None
    for flags, found in rows():
        first = first or found
        name = f"`{flags}`" if flags else "none"
        rest, peak = found.at_rest - first.at_rest, found.peak - first.peak
        print(
            f"| {name} | {found.at_rest / 1e6:.2f} | {rest / 1e6:+.2f} | {found.peak / 1e6:.2f} | "
            f"{peak / 1e6:+.2f} |",
            flush=True,
        )
    assert first is not None
    print(f"\nN = {first.weights:,} weights of the rank, of which it updates {first.updated:,}")


if __name__ == "__main__":
    _rank(sys.argv[1]) if "RANK" in os.environ else main()
