"""LoraConfig: which projections get a low-rank adapter, and how large; PEFT's adapter_config.json.

Pure: flags, checkpoints and models all read this.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qwen2_ascend.errors import UserError, raise_if

PROJECTIONS = {
    "q_proj": "linear_qkv",
    "k_proj": "linear_qkv",
    "v_proj": "linear_qkv",
    "o_proj": "linear_proj",
    "gate_proj": "linear_fc1",
    "up_proj": "linear_fc1",
    "down_proj": "linear_fc2",
}
"""Hugging Face's projections, in the order of the layer, and the Megatron module each is part of.
Every projection has a pair of matrices of its own, as in PEFT, also within a Megatron module."""

ALL_LINEAR = "all-linear"


def projections(names: Iterable[str]) -> tuple[str, ...]:
    """Hugging Face's projections that `names` ask for, in the order of the layer.

    Args:
        names: projections (`q_proj`), Megatron's modules (`linear_qkv` is q_proj, k_proj and
            v_proj), or `all-linear`.

    Raises:
        UserError: a name that is none of these, or no name.
    """
    names = tuple(names)
    known = {ALL_LINEAR, *PROJECTIONS, *PROJECTIONS.values()}
    faults = [
        f"LoRA target {name!r} is not known; use {ALL_LINEAR}, Megatron's "
        f"{', '.join(dict.fromkeys(PROJECTIONS.values()))} or Hugging Face's "
        f"{', '.join(PROJECTIONS)}."
        for name in dict.fromkeys(names)
        if name not in known
    ]
    raise_if(faults if names else [f"LoRA needs at least one target; {ALL_LINEAR} takes all."])
    return tuple(
        projection
        for projection, module in PROJECTIONS.items()
        if {projection, module, ALL_LINEAR} & set(names)
    )


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """One low-rank adapter: W x becomes W x + scaling * B A dropout(x)."""

    rank: int = 16
    """Rows of A and columns of B."""
    alpha: float = 32.0
    """The adapter's output is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Share of the adapter's inputs to drop in training."""
    targets: tuple[str, ...] = (ALL_LINEAR,)
    """Which projections get an adapter, in Megatron's or Hugging Face's names; made into
    Hugging Face's."""
    use_rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (rank-stabilized, arXiv:2312.03732)."""

    def __post_init__(self) -> None:
        faults = []
        if not (type(self.rank) is int and self.rank > 0):
            faults.append(f"LoRA rank={self.rank} must be a positive whole number.")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            faults.append(f"LoRA alpha={self.alpha} must be above zero.")
        if not 0 <= self.dropout < 1:
            faults.append(f"LoRA dropout={self.dropout} must be from 0 to below 1.")
        try:
            object.__setattr__(self, "targets", projections(self.targets))
        except UserError as error:
            faults += error.faults
        raise_if(faults)
        object.__setattr__(self, "alpha", float(self.alpha))

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def describe(self, given: object = None) -> str:
        """One line for a log; `given` is where the values come from."""
        what = f"LoRA: rank {self.rank}, alpha {self.alpha:g} on {', '.join(self.targets)}"
        return f"{what}, from {given}" if given else what

    def to_peft(self, base_model: str | None = None) -> dict[str, Any]:
        """The contents of an adapter_config.json.

        Args:
            base_model: name or folder of the model that was adapted, if it is to be named.
        """
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": int(self.alpha) if float(self.alpha).is_integer() else self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": list(self.targets),
            "use_rslora": self.use_rslora,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "modules_to_save": None,
        }
