"""What the benchmark measures of transformers' generate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from qwen2_ascend.dtypes import TORCH_DTYPES
from qwen2_ascend.pretrained import open_pretrained, open_tokenizer


def generation(folder: Path, dtype: str, new_tokens: int) -> Callable[[list[str]], list[list[int]]]:
    """What makes tokens of texts."""
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
