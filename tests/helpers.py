"""Toy models and other things several tests share."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any
from unittest import mock

from qwen2_ascend.config import Qwen2Config


def tiny_config(**changes: object) -> Qwen2Config:
    """A Qwen2 of about 200,000 weights with every feature: 8 heads in 4 groups, 4 layers."""
    sizes = {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "kv_channels": 8,
        "vocab_size": 256,
        "max_position_embeddings": 128,
        "dtype": "fp32",
    }
    return Qwen2Config(**{**sizes, **changes})  # type: ignore[arg-type]


def random_hugging_face_model(config: Qwen2Config, seed: int = 0):
    """A transformers Qwen2 in fp32 whose biases and norm weights are not their defaults.

    With zero biases and unit norms many a wrong mapping gives right logits.
    """
    import torch
    from transformers import Qwen2Config as HuggingFaceConfig
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM(HuggingFaceConfig(**config.to_hugging_face())).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            scale = 0.3 if weight.dim() == 1 else 0.3 * weight.shape[-1] ** -0.5
            weight.copy_(noise * scale + (1.0 if "norm" in name else 0.0))
    return model.eval()


def generated(
    model: Any, ids: list[int], num_tokens: int, eos: list[int] | None = None, **options: Any
) -> list[int]:
    """What transformers' greedy search, or that of `options`, puts behind one prompt."""
    import torch

    prompt = torch.tensor([ids])
    options = {"do_sample": False, "eos_token_id": eos, "pad_token_id": 0, **options}
    mask = torch.ones_like(prompt)
    found = model.generate(prompt, attention_mask=mask, max_new_tokens=num_tokens, **options)
    return found[0, len(ids) :].tolist()


def make_tiny_hugging_face_folder(
    path: str | Path,
    config: Qwen2Config | None = None,
    seed: int = 0,
    dtype: str | None = None,
    tied: bool | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Writes a genuine transformers folder (config.json and safetensors) with random weights.

    Args:
        path: the folder to make.
        config: the shape, `tiny_config()` by default.
        seed: of the weights.
        dtype: bf16, fp16 or fp32; the config's own by default.
        tied: overrides the config's tie_word_embeddings.
        max_shard_size: transformers' word for splitting into several files.

    Returns:
        `path`.
    """
    import torch

    changes = {"dtype": dtype, "tie_word_embeddings": tied}
    config = dataclasses.replace(
        config or tiny_config(), **{k: v for k, v in changes.items() if v is not None}
    )
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    model = random_hugging_face_model(config, seed).to(dtypes[config.dtype])
    with _without_deepspeed():
        model.save_pretrained(path, max_shard_size=max_shard_size)
    return Path(path)


def _without_deepspeed() -> contextlib.AbstractContextManager:
    """Keeps accelerate from importing it, for seconds, to ask whether a model is its engine."""
    if importlib.util.find_spec("accelerate") is None:
        return contextlib.nullcontext()
    return mock.patch("accelerate.utils.other.is_deepspeed_available", return_value=False)
