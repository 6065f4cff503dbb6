"""--o2-optimizer: AdamW that keeps its two moments in bf16, as MindSpeed-LLM's does.

The fp32 weights stay, and so does the arithmetic of an update: each tensor's moments are widened to
fp32, updated, and rounded to the nearest bf16. An element of the optimizer's state takes 8 bytes
instead of 12. A bf16 number has 8 bits: a second moment that falls by less than 1/512 of itself in
a step stays where it is, so `--adam-beta2 0.999` freezes it. The log says so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.adamw import adamw

from qwen2_ascend.checkpoint.formats.megatron_optimizer import MOMENTS


class HalfMomentsAdamW(torch.optim.AdamW):
    """AdamW over fp32 weights with moments in bf16."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Updates one tensor after the other, so that one pair of fp32 moments exists at a time."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def narrow(self) -> None:
        """Rounds moments that were loaded in fp32."""
        for state in self.state.values():
            _round(state, [state[kind] for kind in MOMENTS])

    def _update(self, parameter: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            self._begin(state, parameter, group)
        moments = [state[kind].float() for kind in MOMENTS]
        beta1, beta2 = group["betas"]
        adamw(
            [parameter],
            [grad],
            *([moment] for moment in moments),
            max_exp_avg_sqs=[],
            state_steps=[state["step"]],
            foreach=False,
            fused=bool(group["fused"]),
            grad_scale=getattr(self, "grad_scale", None),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        _round(state, moments)

    def _begin(self, state: dict[str, Any], parameter: torch.Tensor, group: dict[str, Any]) -> None:
        # as torch: a fused kernel reads the count on the device
        device = parameter.device if group["fused"] else None
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        for kind in MOMENTS:
            state[kind] = torch.zeros_like(parameter, dtype=torch.bfloat16)


def _round(state: dict[str, Any], moments: list[torch.Tensor]) -> None:
    for kind, moment in zip(MOMENTS, moments, strict=True):
        if state[kind].dtype == torch.bfloat16:
            state[kind].copy_(moment)
        else:
            state[kind] = moment.to(torch.bfloat16)
