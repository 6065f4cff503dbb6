"""Memory per rank of one step over a long sequence, with sequences whole and cut.

    PYTHONPATH=plugin:tests python -m distributed.long_sequences [--seq-length 32768]
        [--model 0.5B --algorithms megatron_cp_algo]

A model of 2 layers, of hidden size 64 or of the 0.5B's widths, trains one step of one sequence at
CP1, CP2 and CP4, each rank a process. What autograd keeps for backward is counted in bytes, every
storage once; the weights are not counted. The peak is that of the process's resident memory above
what it had before the step, which has the gradients and the temporary tensors too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from distributed.harness import Checks, Run, launch, main
from distributed.trainings import join
from helpers import tiny_config

SIZES = (1, 2, 4)
ALGORITHMS = ("megatron_cp_algo", "ulysses_cp_algo", "kvallgather_cp_algo")
LENGTH_VARIABLE, MODEL_VARIABLE = "LONG_SEQUENCES_LENGTH", "LONG_SEQUENCES_MODEL"

MODELS = {
    "tiny": {
        "hidden_size": 64,
        "ffn_hidden_size": 176,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 16,
    },
    "0.5B": {
        "hidden_size": 896,
        "ffn_hidden_size": 4864,
        "num_attention_heads": 14,
        "num_query_groups": 2,
        "kv_channels": 64,
    },
}
"""Widths of a layer."""

CHECKS = Checks()


def step(cp: int, algorithm: str, run: Run) -> str:
    """JSON: loss, bytes kept for backward, peak bytes of each rank, seconds."""
    import torch

    length = int(os.environ[LENGTH_VARIABLE])
    training = start(run, cp, algorithm, length)
    batches = training.batches()
    before, begun = resident(), time.perf_counter()
    kept = Kept(training)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        result = training.step(batches)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    own = torch.tensor([kept.num_bytes, peak], dtype=torch.int64)
    ranks = [torch.empty_like(own) for _ in range(cp)]
    torch.distributed.all_gather(ranks, own)
    kept_bytes, peaks = zip(*(x.tolist() for x in ranks), strict=True)
    seconds = time.perf_counter() - begun
    return json.dumps(
        {"loss": result.loss, "kept": kept_bytes, "peak": peaks, "seconds": round(seconds, 1)}
    )


def start(run: Run, cp: int, algorithm: str, length: int) -> Any:
    """A run of random weights on random tokens."""
    from qwen2_ascend.training.plan import make_plan
    from qwen2_ascend.training.pretrain import prepare
    from qwen2_ascend.training.settings import parse, validate

    config = tiny_config(
        **MODELS[os.environ[MODEL_VARIABLE]],
        num_layers=2,
        vocab_size=1024,
        max_position_embeddings=length,
    )
    path = run.folder / "config.json"
    if run.runtime.rank == 0:
        path.write_text(json.dumps(config.to_hugging_face()), encoding="utf-8")
    run.runtime.barrier()
    flags = f"--config {path} --mock-data --seq-length {length} --train-iters 1 --lr 1e-3"
    flags += f" --device cpu --context-parallel-size {cp} --context-parallel-algo {algorithm}"
    flags += " --cross-entropy-chunk-size 1024"
    plan = make_plan(parse(flags.split()))
    join(run, plan, validate)
    run.runtime.seed_all(1)
    return prepare(plan, run.runtime)


class Kept:
    """Counts what autograd keeps of a run's step, each storage once."""

    def __init__(self, training: Any) -> None:
        parameters = [p for chunk in training.chunks for p in chunk.parameters()]
        self._seen = {p.untyped_storage().data_ptr() for p in parameters}
        self._held: list[Any] = []  # so that no storage's place is taken by another
        self.num_bytes = 0

    def pack(self, tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._held.append(tensor)
            self.num_bytes += storage.nbytes()
        return tensor


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


for _size in SIZES:
    for _algorithm in ALGORITHMS if _size > 1 else ALGORITHMS[:1]:
        CHECKS.case(f"{_size} {_algorithm}", _size, step, _size, _algorithm)


def measure(
    length: int, checks: list[Any] | None = None, *, model: str = "tiny"
) -> dict[tuple[int, str], dict[str, Any]]:
    """What `step` says, by (CP, algorithm); each in ranks of their own, whose peak is theirs."""
    os.environ |= {LENGTH_VARIABLE: str(length), MODEL_VARIABLE: model}
    os.environ["CHECKS_STALL_SECONDS"] = "500"  # ranks wait for each other as long as they compute
    found = {}
    for check in checks or CHECKS.all():
        os.environ[ONLY] = check.name
        with tempfile.TemporaryDirectory() as folder:
            result = launch(Path(__file__), check.world_size, Path(folder))[check.name]
        assert result.ok, result.detail
        size, algorithm = check.name.split()
        found[int(size), algorithm] = json.JSONDecoder().raw_decode(result.detail)[0]
    return found


ONLY = "LONG_SEQUENCES_ONLY"


def print_table(length: int, model: str, algorithms: list[str]) -> None:
    print(f"{length:,} tokens, {model}\n")
    print("| CP | algorithm | kept for backward, MB per rank | peak above rest, MB | loss |")
    print("|---|---|---|---|---|")
    for check in CHECKS.all():
        if check.world_size > 1 and check.name.split()[1] not in algorithms:
            continue
        ((size, algorithm), found) = measure(length, [check], model=model).popitem()
        kept, peak = (max(found[name]) / 1e6 for name in ("kept", "peak"))
        words = algorithm if size > 1 else "-"
        print(f"| {size} | {words} | {kept:,.1f} | {peak:,.0f} | {found['loss']:.7f} |", flush=True)


if __name__ == "__main__":
    if "CHECKS_FOLDER" in os.environ:
        chosen = Checks([check for check in CHECKS.all() if check.name == os.environ[ONLY]])
        main(chosen)
    else:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("--seq-length", type=int, default=32768)
        parser.add_argument("--model", choices=MODELS, default="tiny")
        parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=ALGORITHMS)
        given = parser.parse_args()
        sys.exit(print_table(given.seq_length, given.model, given.algorithms))
