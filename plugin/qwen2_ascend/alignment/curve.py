"""The loss curve that transformers and torch.optim.AdamW give, in any dtype.

As Megatron does it: 16-bit models have fp32 main weights, which the optimizer updates and which are
rounded to the model's dtype after each step; gradients are clipped to a norm; norms and biases have
no weight decay.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qwen2_ascend.alignment.settings import CheckSettings


def reference_curve(
    model: Any, main: Any, tokens: Tensor, checks: CheckSettings
) -> list[tuple[float, float]]:
    """(loss, gradient norm before clipping) of each step.

    Args:
        model: transformers' model, which is changed.
        main: the same model with the weights that are updated; `model` itself where its dtype
            is fine enough.
        tokens: `[steps, n, b, s + 1]`.
        checks: the optimizer.
    """
    optimizer = _optimizer(main, checks)
    found = []
    for step_tokens in tokens:
        loss = 0.0
        for batch in step_tokens:
            logits = model(batch[:, :-1], use_cache=False).logits
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            part = cross_entropy(wide.flatten(0, 1), batch[:, 1:].flatten()) / len(step_tokens)
            part.backward()
            loss += part.item()
        if main is not model:
            for weight, parameter in _pairs(main, model):
                assert parameter.grad is not None
                weight.grad, parameter.grad = parameter.grad.to(weight.dtype), None
        limit = checks.clip_grad or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(main.parameters(), limit).item()
        optimizer.step()
        optimizer.zero_grad()
        if main is not model:
            with torch.no_grad():
                for weight, parameter in _pairs(main, model):
                    parameter.copy_(weight)
        found.append((loss, norm))
    return found


def _pairs(main: Any, model: Any) -> Iterator[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    return zip(main.parameters(), model.parameters(), strict=True)


def _optimizer(main: Any, checks: CheckSettings) -> torch.optim.AdamW:
    matrices = [p for p in main.parameters() if p.dim() > 1]
    vectors = [p for p in main.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": checks.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (checks.adam_beta1, checks.adam_beta2)
    return torch.optim.AdamW(groups, lr=checks.lr, betas=betas, eps=checks.adam_eps)
