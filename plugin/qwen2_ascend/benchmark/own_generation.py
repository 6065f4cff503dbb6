"""What the benchmark measures of this project's generation; imported after the runtime's start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen2_ascend.checkpoint.source import open_source
from qwen2_ascend.inference.engine import load_engine
from qwen2_ascend.inference.generator import Generator, Request
from qwen2_ascend.parallel import ParallelLayout
from qwen2_ascend.pretrained import open_tokenizer
from qwen2_ascend.runtime import initialize_model_parallel


def generation(folder: Path, dtype: str, new_tokens: int) -> Callable[[list[str]], list[list[int]]]:
    """What makes tokens of texts."""
    source, layout = open_source(folder), ParallelLayout()
    initialize_model_parallel(layout, source.config.num_layers)
    engines: dict[int, Any] = {}
    tokenizer = open_tokenizer(folder)
    first = load_engine(source, layout, dtype=dtype)

    def run(texts: list[str]) -> list[list[int]]:
        if len(texts) not in engines:
            engines[len(texts)] = type(first)(first.model, source.config, num_rows=len(texts))
        ids = [tokenizer(text).input_ids for text in texts]
        generator = Generator(engines[len(texts)], decode=tokenizer.decode, eos_tokens=[])
        requests = [
            Request(index=i, tokens=tokens, max_new_tokens=new_tokens)
            for i, tokens in enumerate(ids)
        ]
        done = sorted(generator.run(requests), key=lambda completion: completion.index)
        return [completion.tokens for completion in done]

    return run
