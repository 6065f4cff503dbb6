"""Generation on a device, in a process of its own.

python -m npu.generation make FOLDER [LAYERS]
python -m npu.generation run FOLDER DEVICE NEW_TOKENS  # prints a line of JSON
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Any

PROMPTS = [[(7 * i + 3 * j) % 250 + 1 for j in range(5 + 4 * i)] for i in range(8)]
"""Prompts of any vocabulary, of different lengths."""


def make(folder: str, layers: str = "") -> None:
    """Writes the published 0.5B with random weights, or a tiny model of so many layers."""
    from helpers import make_tiny_hugging_face_folder, tiny_config
    from qwen2_ascend.config import Qwen2Config

    if layers:
        make_tiny_hugging_face_folder(folder, tiny_config(num_layers=int(layers)))
    else:
        make_tiny_hugging_face_folder(
            folder, dataclasses.replace(Qwen2Config.named("0.5B"), dtype="bf16")
        )


def run(folder: str, device: str, new_tokens: str) -> None:
    """Generates twice; the second time is told."""
    from qwen2_ascend import runtime
    from qwen2_ascend.checkpoint.source import open_source
    from qwen2_ascend.parallel import ParallelLayout

    running = runtime.start(device, mindspeed=False)
    source, layout = open_source(folder), ParallelLayout()
    runtime.initialize_model_parallel(layout, source.config.num_layers)
    from qwen2_ascend.inference.engine import load_engine

    backend = "npu" if device == "npu" else "torch"
    rows = len(PROMPTS)
    engine = load_engine(source, layout, dtype="bf16", backend=backend, num_rows=rows)
    generated(engine, int(new_tokens))
    running.synchronize()
    start = time.perf_counter()
    tokens = generated(engine, int(new_tokens))
    running.synchronize()
    speed = sum(map(len, tokens)) / (time.perf_counter() - start)
    peak = running.peak_memory_bytes()
    print(json.dumps({"tokens": tokens, "tokens_per_second": speed, "peak_memory_bytes": peak}))
    running.close()


def generated(engine: Any, new_tokens: int) -> list[list[int]]:
    """The tokens after each prompt."""
    from qwen2_ascend.inference.generator import Generator, Request

    requests = [
        Request(index=i, tokens=ids, max_new_tokens=new_tokens) for i, ids in enumerate(PROMPTS)
    ]
    done = Generator(engine, decode=str, eos_tokens=[]).run(requests)
    return [x.tokens for x in sorted(done, key=lambda x: x.index)]


if __name__ == "__main__":
    {"make": make, "run": run}[sys.argv[1]](*sys.argv[2:])
