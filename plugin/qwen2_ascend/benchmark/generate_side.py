"""One side of the generation benchmark: loads a model, times a batch for each question."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from qwen2_ascend import runtime
from qwen2_ascend.benchmark.generate import TEXTS


def prepare(side: str, folder: str, dtype: str, new_tokens: str) -> Callable[[int], dict[str, Any]]:
    """What answers a number of texts."""
    if side == "ours":
        runtime.start("cpu")
        from qwen2_ascend.benchmark.own_generation import generation
    else:
        from qwen2_ascend.benchmark.transformers_generation import generation
    return partial(_measured, generation(Path(folder), dtype, int(new_tokens)))


def _measured(run: Callable[[list[str]], list[list[int]]], num_texts: int) -> dict[str, Any]:
    texts = list(islice(cycle(TEXTS), num_texts))
    start = time.perf_counter()
    tokens = run(texts)
    return {"seconds": time.perf_counter() - start, "tokens": tokens}
