"""The modules of a Qwen2 layer: megatron-core's parameters and parallelism, our operators.

Shapes in Megatron's letters: `s` sequence, `b` micro-batch, `h` hidden, `hn` head width, `np` query
heads and `ng` query groups of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import linear

from qwen2_ascend.model.context_parallel import context_attention
from qwen2_ascend.model.kv_cache import LayerCache
from qwen2_ascend.model.packed import PackedBatch
from qwen2_ascend.model.recompute import computed, not_kept
from qwen2_ascend.model.sequence_cut import SequenceCut
from qwen2_ascend.model.swap import AttentionSwap
from qwen2_ascend.ops import Ops
from qwen2_ascend.runtime import supported_keywords

ROWS_AT_ONCE = 1280
"""How many rows of a weight `column_linear` multiplies at once."""


class RMSNorm(torch.nn.Module):
    """RMSNorm whose weight takes part in sequence parallelism."""

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float,
        *,
        ops: Ops,
        device: torch.device,
    ) -> None:
        super().__init__()
        ones = torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(ones)
        # Each rank sees a part of the sequence, so megatron-core adds the gradients up.
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore
        self.eps = eps
        self.is_recomputed = False
        """Whether the product that takes the output keeps how to compute it, not the output."""
        self._rms_norm = ops.rms_norm

    def forward(self, x: Tensor) -> Tensor:
        return computed(self._normalized, x, again=self.is_recomputed and self.training)

    def _normalized(self, x: Tensor) -> Tensor:
        return self._rms_norm(x, self.weight, self.eps)


class CausalAttention(torch.nn.Module):
    """Core attention: causal, grouped queries, no parameters."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        *,
        ops: Ops,
        **_: Any,
    ) -> None:
        super().__init__()
        assert config.kv_channels is not None
        self.softmax_scale = softmax_scale or config.kv_channels**-0.5
        self.dropout_p = config.attention_dropout
        self.sequence_parallel = config.sequence_parallel
        self.sequence_cut: SequenceCut | None = None
        """Which part of every sequence this rank has; None is all of it."""
        self._ops = ops

    def forward(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedBatch | None = None) -> Tensor:
        """q `[s, b, np, hn]`, k and v `[s, b, ng, hn]` to `[s, b, np * hn]`.

        s is this rank's part of the sequence under context parallelism.
        """
        attend: Callable[..., Tensor] = self._ops.attention
        if (cut := self.sequence_cut) is not None:
            attend = partial(
                context_attention, algorithm=cut.algorithm, group=cut.group, ops=self._ops
            )
        dropout_p = self.dropout_p if self.training else 0.0
        ends = packed.ends if packed else None
        with self._random_state(dropout_p):
            return attend(q, k, v, softmax_scale=self.softmax_scale, dropout_p=dropout_p, ends=ends)

    def cached(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
        """`forward` without dropout, over what `cache` holds besides, which k and v go into."""
        cache.write(k, v)
        if cache.is_fresh:
            return self._ops.attention(q, k, v, softmax_scale=self.softmax_scale, ends=cache.ends)
        return self._ops.cached_attention(
            q, cache.keys, cache.values, lengths=cache.lengths, softmax_scale=self.softmax_scale
        )

    def _random_state(self, dropout_p: float):
        """Each rank drops in its own heads; under sequence parallelism the block forked already."""
        if dropout_p == 0.0 or self.sequence_parallel:
            return nullcontext()
        tracker: Any = tensor_parallel.get_cuda_rng_tracker()
        return tracker.fork()


class Qwen2SelfAttention(SelfAttention):
    """megatron-core's self-attention with a forward that only does what Qwen2 needs."""

    linear_qkv: Any
    linear_proj: Any
    core_attention: Any

    def __init__(self, *args: Any, ops: Ops, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        tp = parallel_state.get_tensor_model_parallel_world_size()
        rank = parallel_state.get_tensor_model_parallel_rank()
        heads, groups = self.config.num_attention_heads, self.config.num_query_groups
        assert groups is not None and self.config.kv_channels is not None
        self._width = self.config.kv_channels
        self._groups = max(groups // tp, 1)
        self._heads_per_group = heads // groups
        # More ranks than groups: `_ranks_per_group` of them share a group's rows, and its heads.
        self._ranks_per_group = max(tp // groups, 1)
        self._group, self._part = divmod(rank, self._ranks_per_group)
        self._rotary = ops.rotary
        self.swap: AttentionSwap | None = None
        """Where what attention keeps for backward goes; None leaves it here."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Tensor,
        inference_context: Any = None,
        packed_seq_params: PackedBatch | None = None,
        attention_bias: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Any]:
        """Attends causally over `hidden_states`, `[s, b, h]`, within each document if packed.

        Returns:
            `[s, b, h]` (its sequence part under sequence parallelism) and no bias.
        """
        unused = (attention_mask, inference_context, attention_bias)
        assert all(x is None for x in unused), "attention here is causal, without further masks"
        with not_kept(hidden_states):
            qkv, _ = self.linear_qkv(hidden_states)
        cos_sin = rotary_pos_emb
        if packed_seq_params is not None:
            cos_sin = packed_seq_params.cos_sin(rotary_pos_emb)
        attend = partial(self._attend, packed=packed_seq_params)
        swaps = self.swap if self.training else None
        with swaps.keeping_outside(cos_sin) if swaps else nullcontext():
            if self.checkpoint_core_attention and self.training:
                context = tensor_parallel.checkpoint(attend, False, qkv, cos_sin)
            else:
                context = attend(qkv, cos_sin)
        return self.linear_proj(context)

    def cached(self, hidden_states: Tensor, cos_sin: Tensor, cache: LayerCache) -> Tensor:
        """`forward` of the newest tokens, for generation; no gradient, no sequence parallelism.

        Args:
            hidden_states: `[s, b, h]`, laid out as `cache` says.
            cos_sin: each token's rotation, `[2, s, hn]` or `[2, s, b, hn]`.
            cache: this layer's keys and values, which the newest tokens' are added to.

        Returns:
            `[s, b, h]`
        """
        qkv = column_linear(hidden_states, self.linear_qkv.weight, self.linear_qkv.bias)
        q, k, v = self._rotated(qkv, cos_sin)
        return row_linear(self.core_attention.cached(q, k, v, cache), self.linear_proj.weight)

    def _attend(self, qkv: Tensor, cos_sin: Tensor, packed: PackedBatch | None) -> Tensor:
        """qkv `[s, b, ng * (np/ng + 2) * hn]` to the context `[s, b, np * hn]`."""
        q, k, v = self._rotated(qkv, cos_sin)
        return self.core_attention(q, k, v, packed)

    def _rotated(self, qkv: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """qkv to q `[s, b, np, hn]`, k and v `[s, b, ng, hn]`; q and k rotated."""
        if self._ranks_per_group > 1:
            qkv = self._whole_group(qkv)
        s, b, _ = qkv.shape
        r = self._heads_per_group
        blocks = qkv.view(s, b, self._groups, r + 2, self._width)
        q, k, v = blocks.split((r, 1, 1), dim=3)
        if self._ranks_per_group > 1:
            q = q.chunk(self._ranks_per_group, dim=3)[self._part]
        cos, sin = cos_sin.unbind()
        q = self._rotary(q, cos, sin).flatten(2, 3)
        k = self._rotary(k, cos, sin).flatten(2, 3)
        return q, k, v.flatten(2, 3)

    def _whole_group(self, qkv: Tensor) -> Tensor:
        """This rank's group out of all ranks' rows, which are plain chunks of the groups."""
        gathered = tensor_parallel.mappings.all_gather_last_dim_from_tensor_parallel_region(qkv)
        return gathered.chunk(self.config.num_query_groups, dim=-1)[self._group]


class Qwen2MLP(MLP):
    """megatron-core's MLP with SwiGLU as one operator."""

    linear_fc1: Any
    linear_fc2: Any

    def __init__(self, config: TransformerConfig, *args: Any, ops: Ops, **told: Any) -> None:
        # Layers since 0.18 tell each MLP what only mixtures of experts take.
        told = supported_keywords(MLP.__init__, ffn_hidden_size=config.ffn_hidden_size, **told)
        super().__init__(config, *args, **told)
        self.recomputes_activation = False
        """Whether linear_fc2 keeps how to compute SwiGLU's output, not the output."""
        self._swiglu = ops.swiglu

    def forward(self, hidden_states: Tensor, *args: Any, **_: Any) -> tuple[Tensor, Tensor | None]:
        """`[s, b, h]` to `[s, b, h]`, and no bias."""
        with not_kept(hidden_states):
            gate_up, _ = self.linear_fc1(hidden_states)
        again = self.recomputes_activation and self.training
        activated = computed(self._swiglu, gate_up, again=again)
        with not_kept(activated):
            return self.linear_fc2(activated)

    def inferred(self, hidden_states: Tensor) -> Tensor:
        """`forward` for generation; no gradient, no sequence parallelism."""
        gate_up = column_linear(hidden_states, self.linear_fc1.weight)
        return row_linear(self._swiglu(gate_up), self.linear_fc2.weight)


def column_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias for generation: this rank's columns of a column-parallel module's output.

    megatron-core's own forward goes through autograd functions and checks, which at one token take
    a good part of the time of a small product. And MKL's fp32 product of a few tokens with a weight
    of many rows is a third faster in blocks of rows, bit for bit the same; measured on one thread,
    more share the rows out already.
    """
    flat = x.flatten(0, -2)
    in_blocks = weight.dtype == torch.float32 and weight.device.type == "cpu" and len(flat) > 1
    if not in_blocks or len(weight) < 2 * ROWS_AT_ONCE or torch.get_num_threads() > 1:
        return linear(x, weight, bias)
    result = x.new_empty(len(flat), len(weight))
    for start in range(0, len(weight), ROWS_AT_ONCE):
        block = slice(start, start + ROWS_AT_ONCE)
        torch.mm(flat, weight[block].t(), out=result[:, block])
    if bias is not None:
        result += bias
    return result.view(*x.shape[:-1], len(weight))


def row_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T for generation, summed over the tensor parallel ranks, each of which has columns."""
    part = linear(x, weight)
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return part
    return tensor_parallel.reduce_from_tensor_model_parallel_region(part)
