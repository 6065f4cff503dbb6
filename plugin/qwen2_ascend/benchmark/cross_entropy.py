"""Memory and time of the output layer with its loss: plain, and in chunks of tokens."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Literal

from qwen2_ascend import runtime
from qwen2_ascend.benchmark.measure import run_measured
from qwen2_ascend.progress import size_text


@dataclass(frozen=True, kw_only=True)
class CrossEntropyBenchmark:
    """Forward and backward of output layer and loss, on the CPU, a process for each way.

    What is counted is anonymous memory at its peak above what hidden states, weight and the
    weight's gradient take, which either way has to have.
    """

    vocab_size: int = 152064
    """Rows of the output layer."""
    hidden_size: int = 896
    """The model's hidden size."""
    seq_length: int = 4096
    """Tokens."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """The dtype of hidden states and weight; the softmax is fp32."""
    chunk_sizes: tuple[int, ...] = (1024, 256)
    """Tokens whose logits exist at once."""


def run(options: CrossEntropyBenchmark) -> None:
    """Measures and prints a table."""
    print(f"{'way':>14} {'seconds':>8} {'peak above the weights':>24}")
    for chunk_size in (0, *options.chunk_sizes):
        seconds, num_bytes = measure(options, chunk_size)
        way = f"chunks of {chunk_size}" if chunk_size else "plain"
        print(f"{way:>14} {seconds:8.2f} {size_text(num_bytes):>24}", flush=True)


def measure(options: CrossEntropyBenchmark, chunk_size: int) -> tuple[float, int]:
    """Seconds and peak bytes of one way; a chunk_size of 0 is the plain one."""
    arguments = asdict(options) | {"chunk_size": chunk_size}
    del arguments["chunk_sizes"]
    measured = run_measured([sys.executable, "-m", __name__, json.dumps(arguments)])
    seconds, floor = map(float, measured.output.split()[-2:])
    return seconds, measured.peak_anonymous_bytes - int(floor)


def main(arguments: str) -> None:
    """Runs in the measured process: prints the seconds and the bytes it began with."""
    runtime.start("cpu")
    from qwen2_ascend.benchmark.cross_entropy_step import step

    print(*step(**json.loads(arguments)))


if __name__ == "__main__":
    main(sys.argv[1])
