"""megatron-core's column- and row-parallel linear layers, with `overlap.py`'s products.

The parameters, their names, marks and initialization are megatron-core's; so are the numbers, up to
the order in which a product adds up. Backward keeps what megatron-core's own keeps: the input as
this rank has it, which is gathered anew for the weight's gradient.

Shapes: x `[s, b, k]`, under sequence parallelism `[s/tp, b, k]` before a column-parallel layer and
after a row-parallel one; weight `[o, k]` of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwen2_ascend.model.overlap import MakeOverlap, Overlap, start_gather, start_scatter


def _group() -> Any:
    return parallel_state.get_tensor_model_parallel_group()


class OverlappedColumnLinear(ColumnParallelLinear):
    """A column-parallel layer of a decoder layer: input whole or cut by sequence, output cut."""

    def __init__(self, *args: Any, overlap: MakeOverlap, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        is_ours = not self.gather_output and (self.bias is None or not self.skip_bias_add)
        assert is_ours, "not a layer of this package's spec"
        self._overlap = overlap(_group())

    def forward(self, input_: Tensor, *_: Any) -> tuple[Tensor, None]:  # pyright: ignore
        """x to `[s, b, o]`, and no bias to be added later."""
        result: Any = _ColumnProduct.apply(
            input_, self.weight, self.bias, self._overlap, self.sequence_parallel
        )
        return result, None


class OverlappedRowLinear(RowParallelLinear):
    """A row-parallel layer of a decoder layer, without bias: input cut by columns."""

    def __init__(self, *args: Any, overlap: MakeOverlap, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.input_is_parallel and self.bias is None, "not a layer of this package's spec"
        self._overlap = overlap(_group())

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        """x `[s, b, k]` to the sum over the ranks, and no bias."""
        result: Any = _RowProduct.apply(input_, self.weight, self._overlap, self.sequence_parallel)
        return result, None


class _ColumnProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        overlap: Overlap,
        sequence_parallel: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.overlap, ctx.sequence_parallel = overlap, sequence_parallel
        rows = x.flatten(0, 1)
        if sequence_parallel:
            output, _ = overlap.gathered(rows, weight.t(), keep=False)
        else:
            output = torch.mm(rows, weight.t())
        if bias is not None:
            output += bias
        return output.view(-1, x.shape[1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore
        """The input's gradient is exchanged while the weight's is computed; of a frozen weight,
        which has none, while itself is."""
        x, weight = ctx.saved_tensors
        group = _group()
        is_trained, rows = ctx.needs_input_grad[1], grad.flatten(0, 1)
        gathering = None
        if ctx.sequence_parallel and is_trained:
            gathering = start_gather(x.flatten(0, 1), group)
            exchange = start_scatter(torch.mm(rows, weight), group)
        elif ctx.sequence_parallel:
            exchange = ctx.overlap.scattered(rows, weight)
        else:
            exchange = ctx.overlap.summed(rows, weight)
        grad_weight = grad_bias = None
        if is_trained:
            total = x.flatten(0, 1) if gathering is None else gathering()
            grad_weight = torch.mm(rows.t(), total)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(dim=0)
        return exchange().view(x.shape), grad_weight, grad_bias, None, None


class _RowProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, overlap: Overlap, sequence_parallel: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.overlap, ctx.sequence_parallel = overlap, sequence_parallel
        multiply = overlap.scattered if sequence_parallel else overlap.summed
        return multiply(x.flatten(0, 1), weight.t())().view(-1, x.shape[1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore
        """Every rank's part of the gradient's sequence is gathered; without parts it is there."""
        x, weight = ctx.saved_tensors
        is_trained, rows = ctx.needs_input_grad[1], grad.flatten(0, 1)
        if ctx.sequence_parallel:
            grad_x, total = ctx.overlap.gathered(rows, weight, keep=is_trained)
        else:
            grad_x, total = torch.mm(rows, weight), rows
        grad_weight = torch.mm(total.t(), x.flatten(0, 1)) if is_trained else None
        return grad_x.view(x.shape), grad_weight, None, None
