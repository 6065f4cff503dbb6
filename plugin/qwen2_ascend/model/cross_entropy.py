"""Cross entropy whose vocabulary-sized logits never exist at once.

The plain way holds the logits of all tokens, `[s, b, vocabulary / tp]`: in the model's dtype, and
again as the fp32 softmax until backward. Here the logits of a few tokens exist at a time and
nothing of that size is kept; backward computes them again. It costs one matrix product more (a
third of the output layer's time) and gives the same losses and gradients but for rounding.

Forward goes by chunks of tokens, each with all of this rank's vocabulary; their softmax is finished
by two small collectives at the end. Backward goes by blocks of the vocabulary, each with all tokens
and as many logits as a chunk had: so every row of the weight's gradient is one matrix product over
all tokens as in the plain way, and there are no sums over chunks to round.

Shapes in Megatron's letters: `s` sequence, `b` micro-batch, `t` = s * b tokens, `h` hidden, `v`
rows of the (padded) vocabulary on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor


class ChunkedLossModel(GPTModel):
    """GPTModel that computes losses by `chunked_cross_entropy`; without labels it is the same.

    Attributes:
        cross_entropy_chunk_size: tokens whose logits exist at once.
    """

    cross_entropy_chunk_size: int | None = None
    output_layer: Any

    def forward(self, *args: Any, labels: Tensor | None = None, **keywords: Any) -> Tensor:
        """Losses `[b, s]` with labels; else logits, or the hidden states of an earlier stage.

        The arguments are GPTModel's, with `labels` by its name.
        """
        forward: Any = super().forward
        if labels is None or not self.post_process:
            return forward(*args, labels=labels, **keywords)
        # The last thing GPTModel.forward does is what to do with the hidden states: hand them on
        # here, as an earlier stage would, in every release of megatron-core.
        self.post_process = False
        try:
            hidden = forward(*args, **keywords)
        finally:
            self.post_process = True
        is_shared = self.share_embeddings_and_output_weights
        assert self.cross_entropy_chunk_size is not None
        _wait_for_weights(self.output_layer)
        weight = self.shared_embedding_or_output_weight() if is_shared else self.output_layer.weight
        return chunked_cross_entropy(
            hidden,
            weight,
            labels,
            chunk_size=self.cross_entropy_chunk_size,
            sequence_parallel=self.config.sequence_parallel,
        )


def _wait_for_weights(module: torch.nn.Module) -> None:
    """Does what comes before the module's forward, for whoever reads its weights without it.

    With --overlap-param-gather a hook waits there for the weights that other ranks have updated.
    """
    for number, hook in module._forward_pre_hooks.items():
        if number not in module._forward_pre_hooks_with_kwargs:
            hook(module, ())


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunk_size: int,
    sequence_parallel: bool = False,
) -> Tensor:
    """Each token's cross entropy, over the vocabulary of all tensor-parallel ranks.

    Args:
        hidden: what the output layer would get, `[s, b, h]`; under sequence parallelism this
            rank's part of the sequence.
        weight: this rank's rows of the output weight, `[v, h]`; rows of padding count as they do
            in megatron-core's own cross entropy.
        labels: `[b, s]`. One that is outside the vocabulary gives a loss that has to be masked.
        chunk_size: tokens whose logits exist at once.
        sequence_parallel: whether `hidden` is a part of the sequence.

    Returns:
        `[b, s]`, fp32, the same on every tensor-parallel rank.
    """
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden)
    s, b, _ = hidden.shape
    tokens = labels.t().reshape(-1)
    losses: Any = _ChunkedCrossEntropy.apply(hidden.flatten(0, 1), weight, tokens, chunk_size)
    return losses.view(s, b).t().contiguous()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """hidden `[t, h]`, weight `[v, h]`, labels `[t]` to losses `[t]`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int):
        group = parallel_state.get_tensor_model_parallel_group()
        labels = labels - parallel_state.get_tensor_model_parallel_rank() * len(weight)
        parts = [
            _softmax_parts(hidden_part, weight, labels_part)
            for hidden_part, labels_part in zip(
                hidden.split(chunk_size), labels.split(chunk_size), strict=True
            )
        ]
        own_max, total, label_logit = (torch.cat(part) for part in zip(*parts, strict=True))
        logits_max = own_max.clone()
        torch.distributed.all_reduce(logits_max, torch.distributed.ReduceOp.MAX, group=group)
        total *= (own_max - logits_max).exp_()
        label_logit = (label_logit - logits_max).masked_fill_(~_is_in(labels, len(weight)), 0)
        sums = torch.stack((total, label_logit))
        torch.distributed.all_reduce(sums, group=group)
        total, label_logit = sums.unbind()
        ctx.save_for_backward(hidden, weight, labels, logits_max, total)
        ctx.chunk_size = chunk_size
        return total.log() - label_logit

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        hidden, weight, labels, logits_max, total = ctx.saved_tensors
        (grad_losses,) = grads
        block_rows = max(1, ctx.chunk_size * len(weight) // max(len(hidden), 1))
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        # softmax = exp(logit - max) / total, and both gradients are linear in it
        scale = (grad_losses / total).unsqueeze(-1)
        for start in range(0, len(weight), block_rows):
            rows = weight[start : start + block_rows]
            grad_logits = _logits(hidden, rows).sub_(logits_max.unsqueeze(-1)).exp_().mul_(scale)
            _subtract_at(grad_logits, labels - start, grad_losses)
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden += grad_logits @ rows
            if grad_weight is not None:
                torch.mm(grad_logits.t(), hidden, out=grad_weight[start : start + block_rows])
            del grad_logits  # before the next block is computed
        return grad_hidden.to(hidden.dtype), grad_weight, None, None


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """fp32 of what the output layer gives in the model's dtype, `[t, v]`."""
    return torch.mm(hidden, weight.t()).float()


def _softmax_parts(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """A chunk's largest logit, its sum of exp(logit - largest) and its label's logit, `[t]` each.

    The label's logit means nothing where the label is on another rank.
    """
    logits = _logits(hidden, weight)
    largest = logits.amax(dim=-1)
    label_logit = logits.gather(1, labels.clamp(0, len(weight) - 1).unsqueeze(1)).squeeze(1)
    return largest, logits.sub_(largest.unsqueeze(1)).exp_().sum(dim=-1), label_logit


def _subtract_at(matrix: Tensor, columns: Tensor, values: Tensor) -> None:
    """matrix[i, columns[i]] -= values[i], where there is such a column; without asking the device.

    Args:
        matrix: `[t, v]`
        columns: `[t]`
        values: `[t]`
    """
    width = matrix.shape[1]
    values = values.masked_fill(~_is_in(columns, width), 0)
    rows = torch.arange(len(matrix), device=matrix.device)
    matrix[rows, columns.clamp(0, width - 1)] -= values


def _is_in(labels: Tensor, size: int) -> Tensor:
    return (labels >= 0) & (labels < size)
