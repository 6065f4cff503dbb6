"""FusionSettings: which operators are fused kernels; every one of them can be switched off.

The flags are those of Megatron-LM and MindSpeed-LLM: the former's switch off, the latter's on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import tyro

from qwen2_ascend.flags import Flag

LAYER_OPERATORS = ("attention", "rms_norm", "rotary", "swiglu")
"""What can be fused in a layer, under the names in `ops`."""


@dataclass(frozen=True, kw_only=True)
class FusionSettings:
    """Fused kernels: on an npu all of them by default, on a cpu AdamW, elsewhere none."""

    attention_backend: Literal["auto", "flash", "fused", "unfused", "local"] = "auto"
    """auto: flash attention on an npu, torch's scaled_dot_product_attention elsewhere. flash or
    fused: insist on torch_npu's, which is both. unfused or local: scores, softmax and context each
    as operators of their own, on any device; needs memory for s x s scores per head."""
    use_flash_attn: Flag = False
    """The same as --attention-backend flash."""
    use_fused_rmsnorm: Flag = False
    """Insist on the fused RMSNorm, which is the default on an npu."""
    use_fused_rotary_pos_emb: Flag = False
    """Insist on the fused rotary embedding, which is the default on an npu."""
    use_fused_swiglu: Flag = False
    """Insist on the fused SwiGLU, which is the default on an npu."""
    use_fused_adamw: Flag = False
    """Insist on the fused AdamW, which is the default on an npu."""
    no_fused_rmsnorm: Flag = False
    """RMSNorm in plain torch."""
    no_fused_rotary_pos_emb: Annotated[Flag, tyro.conf.arg(aliases=["--no-rope-fusion"])] = False
    """Rotary embedding in plain torch."""
    no_fused_swiglu: Annotated[Flag, tyro.conf.arg(aliases=["--no-bias-swiglu-fusion"])] = False
    """SwiGLU in plain torch."""
    no_fused_adamw: Flag = False
    """torch's AdamW in loops over many tensors at a time, not as one kernel per tensor."""

    def backend(self, device: str) -> str:
        """`build_model`'s backend on `device`: cpu, cuda or npu."""
        return "npu" if device == "npu" else "torch"

    @property
    def plain(self) -> tuple[str, ...]:
        """`build_model`'s plain: operators of a layer that no fused kernel is to compute."""
        return tuple(name for name in LAYER_OPERATORS if self._wishes()[name].refused)

    def fused(self, device: str) -> tuple[str, ...]:
        """Operators that are kernels of torch_npu's on `device`: cpu, cuda or npu."""
        wishes = self._wishes()
        return tuple(name for name in wishes if device == "npu" and not wishes[name].refused)

    def has_fused_adamw(self, device: str) -> bool:
        """Whether one kernel updates a tensor: torch_npu's, or on a cpu torch's own."""
        return "adamw" in self.fused("npu" if device == "cpu" else device)

    def describe(self, device: str) -> str:
        """One line for a log."""
        fused = ", ".join(self.fused(device)) or "nothing"
        plain = [name for name, wish in self._wishes().items() if wish.refused]
        return f"fused: {fused}" + (f"; switched off: {', '.join(plain)}" if plain else "")

    def faults(self, device: str) -> list[str]:
        """What contradicts itself or the device; "auto" is a device that is not known yet."""
        wishes = self._wishes()
        faults = [
            f"{wish.on} and {wish.off}: give one of them."
            for wish in wishes.values()
            if wish.wanted and wish.refused
        ]
        faults += [
            f"{wish.on} asks for a kernel of torch_npu's, and the device is {device}; leave it "
            "out, the plain operator computes the same."
            for wish in wishes.values()
            if wish.wanted and not wish.refused and device in ("cpu", "cuda")
        ]
        return faults

    def _wishes(self) -> dict[str, _Wish]:
        """What is asked for, of every operator that can be fused."""
        backend = f"--attention-backend {self.attention_backend}"
        insisted = self.attention_backend in ("flash", "fused")
        attention = _Wish(
            on=backend if insisted else "--use-flash-attn",
            off=backend,
            wanted=insisted or self.use_flash_attn,
            refused=self.attention_backend in ("unfused", "local"),
        )
        names = {
            "rms_norm": "rmsnorm",
            "rotary": "rotary_pos_emb",
            "swiglu": "swiglu",
            "adamw": "adamw",
        }
        return {"attention": attention} | {
            operator: _Wish(
                on=f"--use-fused-{name.replace('_', '-')}",
                off=f"--no-fused-{name.replace('_', '-')}",
                wanted=getattr(self, f"use_fused_{name}"),
                refused=getattr(self, f"no_fused_{name}"),
            )
            for operator, name in names.items()
        }


class _Wish(NamedTuple):
    """What the flags say of one operator."""

    on: str
    """The flag that insists on its fused kernel."""
    off: str
    wanted: bool
    refused: bool
