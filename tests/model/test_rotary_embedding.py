"""Rotary tables are transformers' own, bit for bit, up to the longest contexts."""

from __future__ import annotations

import pytest
import torch

from helpers import tiny_config
from qwen2_ascend.config import Qwen2Config, YarnScaling

YARN = YarnScaling(factor=4.0, original_max_position_embeddings=32768, attention_factor=1.1386)
CONFIGS = {
    "plain": tiny_config(kv_channels=128),
    "plain 10000": tiny_config(kv_channels=64, rotary_base=10000.0),
    "yarn": tiny_config(kv_channels=128, yarn=YARN),
    "yarn, whole ramp": tiny_config(
        kv_channels=64,
        yarn=YarnScaling(
            factor=2.5,
            original_max_position_embeddings=1000,
            attention_factor=1.0,
            beta_fast=20.0,
            beta_slow=3.0,
            truncate=False,
        ),
    ),
    "yarn, narrow ramp": tiny_config(
        kv_channels=8,
        yarn=YarnScaling(factor=8.0, original_max_position_embeddings=7, attention_factor=1.2),
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_are_those_of_transformers(name: str, dtype: torch.dtype) -> None:
    from qwen2_ascend.model.rotary_embedding import Qwen2RotaryEmbedding

    config: Qwen2Config = CONFIGS[name]
    positions = [0, 1, 2, 17, 4095, 32767, 131071]
    ours = Qwen2RotaryEmbedding(config, dtype, torch.device("cpu"))
    table = ours(1000)
    assert table.shape == (2, 1000, config.kv_channels)
    table = ours(max(positions) + 1)
    assert torch.equal(ours(1000), table[:, :1000])
    expected = _transformers_tables(config, positions, dtype)
    assert torch.equal(table[:, positions], expected)


def _transformers_tables(
    config: Qwen2Config, positions: list[int], dtype: torch.dtype
) -> torch.Tensor:
    from transformers import Qwen2Config as HuggingFaceConfig
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    theirs = Qwen2RotaryEmbedding(HuggingFaceConfig(**config.to_hugging_face()))
    tables = theirs(torch.zeros(1, dtype=dtype), torch.tensor([positions]))
    return torch.cat(tables)


def test_fp64_tables_are_more_exact_than_fp32() -> None:
    from qwen2_ascend.model.rotary_embedding import Qwen2RotaryEmbedding

    config = CONFIGS["plain"]
    tables = {
        dtype: Qwen2RotaryEmbedding(config, dtype, torch.device("cpu"))(30000)
        for dtype in (torch.float32, torch.float64)
    }
    position, width = 29999, config.kv_channels
    angles = position / config.rotary_base ** (torch.arange(0, width, 2).double() / width)
    errors = {
        dtype: (table[0, position, : width // 2] - angles.cos()).abs().max().item()
        for dtype, table in tables.items()
    }
    assert errors[torch.float64] < 1e-11 < 1e-5 < errors[torch.float32]
