"""Fills a Hugging Face folder that has a config.json with weights as transformers draws them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qwen2_ascend.pretrained import open_pretrained


def prepare(folder: str) -> Callable[[Any], Any]:
    """Writes the weights; then it has nothing to answer."""
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
