"""Fills a Hugging Face folder that has a config.json with weights as transformers draws them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from qwen2_ascend.benchmark.sides import serve
from qwen2_ascend.pretrained import open_pretrained


def main(folder: str) -> None:
    """Writes the weights; then it has nothing to answer."""
    serve(lambda: _made(folder))


def _made(folder: str) -> Callable[[Any], Any]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        open_pretrained(AutoConfig, folder), trust_remote_code=False
    )
    with torch.no_grad():  # biases of zero and norms of one would hide a side that leaves them out
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return lambda question: question


if __name__ == "__main__":
    main(*sys.argv[1:])
