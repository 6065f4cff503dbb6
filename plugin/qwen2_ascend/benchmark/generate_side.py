"""One side of the generation benchmark: loads a model, times a batch for each line it reads."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from qwen2_ascend import runtime
from qwen2_ascend.benchmark.generate import TEXTS
from qwen2_ascend.benchmark.sides import serve
from qwen2_ascend.checkpoint.source import open_source
from qwen2_ascend.parallel import ParallelLayout
from qwen2_ascend.pretrained import open_pretrained, open_tokenizer


def main(side: str, folder: str, dtype: str, new_tokens: str) -> None:
    """Serves the standard input, each line a number of texts, until it ends."""
    build = {"ours": _ours, "transformers": _transformers}[side]
    serve(lambda: partial(_measured, build(Path(folder), dtype, int(new_tokens))))


def _measured(run: Callable[[list[str]], list[list[int]]], num_texts: int) -> dict[str, Any]:
    texts = list(islice(cycle(TEXTS), num_texts))
    start = time.perf_counter()
    tokens = run(texts)
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


def _ours(folder: Path, dtype: str, new_tokens: int) -> Callable[[list[str]], list[list[int]]]:
    runtime.start("cpu")
    source, layout = open_source(folder), ParallelLayout()
    runtime.initialize_model_parallel(layout, source.config.num_layers)

    from qwen2_ascend.inference.engine import load_engine
    from qwen2_ascend.inference.generator import Generator, Request

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


def _transformers(
    folder: Path, dtype: str, new_tokens: int
) -> Callable[[list[str]], list[list[int]]]:
    import torch
    from transformers import AutoModelForCausalLM

    from qwen2_ascend.dtypes import TORCH_DTYPES

    tokenizer = open_tokenizer(folder, padding_side="left")
    model: Any = open_pretrained(AutoModelForCausalLM, folder, dtype=TORCH_DTYPES[dtype]).eval()
    model.generation_config.eos_token_id = None

    def run(texts: list[str]) -> list[list[int]]:
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        with torch.inference_mode():
            output = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False)
        tokens = output[:, batch.input_ids.shape[1] :].tolist()
        for row in tokens:  # the text, which the other side makes too
            tokenizer.decode(row)
        return tokens

    return run


if __name__ == "__main__":
    main(*sys.argv[1:])
