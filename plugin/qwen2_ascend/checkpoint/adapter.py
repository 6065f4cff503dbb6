"""An opened LoRA adapter, whatever wrote it: pairs of matrices whose products are added to weights.

PEFT folders (`formats/peft_adapter.py`) and Megatron shards of MindSpeed-LLM
(`formats/megatron_adapter.py`) are both opened as this; `merging.py` adds it up.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from qwen2_ascend.checkpoint.plan import StoredSlice
from qwen2_ascend.checkpoint.rules import Box
from qwen2_ascend.lora_config import LoraConfig


class Factors(NamedTuple):
    """What is added to a box of one weight: b a, times the adapter's scaling."""

    tensor: str
    """The weight, by its whole-model Megatron name."""
    box: Box
    """The box lies in the weight's view."""
    a: StoredSlice
    """`[r, columns of the box]`"""
    b: StoredSlice
    """`[rows of the box, block after block, r]`"""
    scaling: float | None = None
    """Where it is another than the adapter's."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Its settings, and its matrices with their places in the model; no tensor data is read."""

    folder: Path
    lora: LoraConfig
    factors: tuple[Factors, ...]
    base: tuple[StoredSlice, ...] = ()
    """The weights that it was trained on, where they are stored with it."""

    @property
    def held(self) -> tuple[StoredSlice, ...]:
        """All its matrices, each once."""
        return tuple(dict.fromkeys(held for one in self.factors for held in (one.a, one.b)))

    @property
    def files(self) -> tuple[Path, ...]:
        """What is read of it."""
        return tuple(dict.fromkeys(one.stored.path for one in (*self.held, *self.base)))
