"""The loss curve that transformers and torch.optim.AdamW give, in any dtype.

As Megatron does it: 16-bit models have fp32 main weights, which the optimizer updates and which are
rounded to the model's dtype after each step; gradients are clipped to a norm; norms and biases have
no weight decay.

Memory is what limits a curve in fp64, so no more than one parameter's gradient lives at a time: a
first backward measures the norm, a second one updates each weight as its gradient comes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qwen2_ascend.alignment.reference import gradients_taken
from qwen2_ascend.alignment.settings import CheckSettings

PIECE = 1 << 22
"""Weights that are updated at once: AdamW takes several times their memory."""
_MEANS = ("exp_avg", "exp_avg_sq")


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
    optimizers = {
        parameter: _PiecewiseAdamW(weight, checks)
        for parameter, weight in zip(model.parameters(), main.parameters(), strict=True)
    }
    limit = checks.clip_grad or math.inf
    found = []
    for step_tokens in tokens:
        squares: list[float] = []

        def measure(_: Tensor, gradient: Tensor, into: list[float] = squares) -> None:
            dtype = torch.promote_types(gradient.dtype, torch.float32)
            into.append(gradient.norm(dtype=dtype).item() ** 2)

        loss = _backward(model, step_tokens, measure)
        norm = math.sqrt(sum(squares))
        scale = min(1.0, limit / (norm + 1e-6))

        def update(parameter: Tensor, gradient: Tensor, scale: float = scale) -> None:
            optimizers[parameter].step(parameter, gradient, scale)

        _backward(model, step_tokens, update)
        found.append((loss, norm))
    return found


def _backward(model: Any, tokens: Tensor, take: Any) -> float:
    """The mean loss over the micro-batches of `[n, b, s + 1]`; `take` is given its gradients."""
    loss = 0.0
    for index, batch in enumerate(tokens):
        logits = model(batch[:, :-1], use_cache=False).logits
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        part = cross_entropy(wide.flatten(0, 1), batch[:, 1:].flatten()) / len(tokens)
        loss += part.item()
        if index < len(tokens) - 1:
            part.backward()
        else:
            with gradients_taken(model, take):
                part.backward()
    return loss


class _PiecewiseAdamW:
    """torch.optim.AdamW on pieces of one weight, which it treats alike anyway.

    The running means are fp32 between steps, as they are in training: what that rounds off an
    update is far less than what fp32 weights round off it.

    Args:
        weight: updated in place.
        checks: the optimizer.
    """

    def __init__(self, weight: Tensor, checks: CheckSettings) -> None:
        decay = checks.weight_decay if weight.dim() > 1 else 0.0
        betas = (checks.adam_beta1, checks.adam_beta2)
        self._weight = weight
        self._pieces = [torch.nn.Parameter(x) for x in weight.detach().view(-1).split(PIECE)]
        self._optimizers = [
            torch.optim.AdamW(
                [piece], lr=checks.lr, betas=betas, eps=checks.adam_eps, weight_decay=decay
            )
            for piece in self._pieces
        ]

    def step(self, parameter: Tensor, gradient: Tensor, scale: float) -> None:
        """Updates the weight, and `parameter`, which is it or a rounded copy of it."""
        gradients = gradient.reshape(-1).split(PIECE)
        for piece, optimizer, part in zip(self._pieces, self._optimizers, gradients, strict=True):
            piece.grad = part.to(piece.dtype) * scale
            means: dict[str, Tensor] = optimizer.state[piece]
            self._convert(means, piece.dtype)
            optimizer.step()
            self._convert(means, torch.float32)
            piece.grad = None
        if parameter is not self._weight:
            parameter.data.copy_(self._weight)

    @staticmethod
    def _convert(means: dict[str, Tensor], dtype: torch.dtype) -> None:
        for name in _MEANS:
            if name in means:
                means[name] = means[name].to(dtype)
