"""Outputs of cheap operators that are not kept for backward but computed again when it asks.

SwiGLU's output and a norm's are inputs of matrix products, which keep them. Here a product keeps in
their place how to compute them, from what their own backward keeps anyway. The same operator gets
the same input again, so the gradients are the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

Compute = Callable[[Tensor], Tensor]
_AGAIN = "_qwen2_ascend_again"


@dataclass(frozen=True, kw_only=True)
class RecomputedOutputs:
    """Which layers of a model chunk do not keep an operator's output."""

    number: int
    """Layers that do not."""
    after: int = 0
    """Layers before them, which are recomputed whole."""

    def layers(self, num_layers: int) -> range:
        """Their places in a chunk of `num_layers`."""
        last = min(self.after + self.number, num_layers)
        return range(min(self.after, last), last)


def computed(compute: Compute, x: Tensor, *, again: bool) -> Tensor:
    """compute(x), which `not_kept` will not let anyone keep if `again` says so."""
    output = compute(x)
    if again and torch.is_grad_enabled():
        setattr(output, _AGAIN, (compute, x.detach()))
    return output


def not_kept(output: Tensor) -> AbstractContextManager[Any]:
    """Where autograd does not keep `output`, if it was `computed` to be computed again."""
    again = getattr(output, _AGAIN, None)
    if again is None:
        return nullcontext()
    compute, x = again
    address, size = output.data_ptr(), output.numel()

    def pack(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        # a product may keep it with other dimensions
        is_output = tensor.data_ptr() == address and tensor.numel() == size
        return partial(recomputed, tensor.shape) if is_output and tensor.is_contiguous() else tensor

    def recomputed(shape: torch.Size) -> Tensor:
        with torch.no_grad():
            return compute(x).view(shape)

    def unpack(packed: Tensor | Callable[[], Tensor]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def choose_layers(
    layers: Iterable[Any],
    activations: RecomputedOutputs | None,
    norms: RecomputedOutputs | None,
) -> None:
    """Tells the layers of a chunk which of their outputs are computed again.

    Args:
        layers: in order.
        activations: the layers whose SwiGLU output is computed again; None is none.
        norms: the layers whose norms' outputs are computed again; None is none.
    """
    layers = list(layers)
    for index in activations.layers(len(layers)) if activations else ():
        layers[index].mlp.recomputes_activation = True
    for index in norms.layers(len(layers)) if norms else ():
        layers[index].input_layernorm.is_recomputed = True
        layers[index].pre_mlp_layernorm.is_recomputed = True
