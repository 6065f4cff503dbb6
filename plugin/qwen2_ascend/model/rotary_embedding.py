"""Rotary tables: plain RoPE and YaRN, computed once and shared by all layers.

The arithmetic follows transformers' order, step by step: at a position of 30,000 one rounding of
the angle in fp32 is already worth 1e-3, so equal formulas are not enough for equal logits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from qwen2_ascend.config import Qwen2Config, YarnScaling
from qwen2_ascend.model.sequence_cut import SequenceCut


class Qwen2RotaryEmbedding(RotaryEmbedding):
    """Gives GPTModel cos and sin stacked, `[2, s, hn]`, in the model's dtype.

    megatron-core passes the tensor through to every layer's attention without looking inside.
    """

    def __init__(
        self,
        config: Qwen2Config,
        dtype: torch.dtype,
        device: torch.device,
        sequence_cut: SequenceCut | None = None,
    ) -> None:
        super().__init__(config.kv_channels, rotary_percent=1.0, use_cpu_initialization=True)
        self._dtype = dtype
        wide = torch.promote_types(dtype, torch.float32)
        self.inv_freq = inverse_frequencies(config, wide).to(device)
        self._scale = config.yarn.attention_factor if config.yarn else 1.0
        self._table = torch.empty(2, 0, config.kv_channels, dtype=dtype, device=device)
        self._cut = sequence_cut
        self._own = self._table

    def forward(  # pyright: ignore[reportIncompatibleVariableOverride]  # theirs is cached
        self, max_seq_len: int, *args: Any, packed_seq: bool = False, **kwargs: Any
    ) -> Tensor:
        """cos and sin of positions 0 ... max_seq_len - 1, `[2, s, hn]`.

        Under context parallelism those of this rank's positions, but of packed documents all: they
        are looked up by each token's place in its document.
        """
        if self._table.shape[1] < max_seq_len:
            self._table = self._compute(max_seq_len)
        table = self._table[:, :max_seq_len]
        if self._cut is None or packed_seq:
            return table
        if self._own.shape[1] * self._cut.size != max_seq_len:
            self._own = self._cut.own(table, dim=1)
        return self._own

    @torch.no_grad()
    def _compute(self, length: int) -> Tensor:
        positions = torch.arange(length, dtype=self.inv_freq.dtype, device=self.inv_freq.device)
        angles = torch.outer(positions, self.inv_freq)
        angles = torch.cat((angles, angles), dim=-1)
        table = torch.stack((angles.cos(), angles.sin())) * self._scale
        return table.to(self._dtype)


def inverse_frequencies(config: Qwen2Config, dtype: torch.dtype = torch.float32) -> Tensor:
    """Radians per position of each pair of dimensions, `[hn / 2]`."""
    width, base = config.kv_channels, config.rotary_base
    periods = base ** (torch.arange(0, width, 2, dtype=dtype) / width)
    if config.yarn is None:
        return 1.0 / periods
    yarn = config.yarn
    low, high = _ramp_bounds(yarn, width, base)
    ramp = (torch.arange(width // 2, dtype=dtype) - low) / (high - low)
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (yarn.factor * periods) * (1 - kept) + 1.0 / periods * kept


def _ramp_bounds(yarn: YarnScaling, width: int, base: float) -> tuple[float, float]:
    """Dimensions between which YaRN goes from leaving a frequency alone to interpolating it."""

    def dimension(rotations: float) -> float:
        context = yarn.original_max_position_embeddings
        return width * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    return low, high if high > low else low + 0.001
