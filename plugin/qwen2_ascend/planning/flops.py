"""How much arithmetic training is: the planner, the training log and the benchmarks count it here.

A multiplication and its addition count as two. Counted are the products with the weights of all
layers' linear modules and of the output layer (the embedding is looked up), and attention's scores
and context, of which a causal token sees (s + 1) / 2 tokens on average. Backward computes the
gradients of both factors of every product, twice the forward (Narayanan et al. 2021,
arXiv:2104.04473). Norms, rotation, softmax, the optimizer and what recomputation computes again are
not counted.
"""

from __future__ import annotations

from functools import cache
from math import prod

from qwen2_ascend.checkpoint.rules import qwen2_rules
from qwen2_ascend.config import Qwen2Config


@cache
def layer_products(config: Qwen2Config) -> int:
    """Operations of a layer's products with its weights, per token, forward."""
    rules = qwen2_rules(config)
    return sum(2 * prod(r.view) for r in rules if r.is_of_layer and r.is_matrix)


def output_products(config: Qwen2Config, padded_vocab_size: int) -> int:
    """Operations of the output layer, per token, forward."""
    return 2 * config.hidden_size * padded_vocab_size


def attention_flops(seq_length: int, num_heads: int, width: int) -> int:
    """Operations of causal attention's scores and context, per token and layer, forward."""
    return 2 * num_heads * width * (seq_length + 1)


def train_flops_per_token(config: Qwen2Config, seq_length: int, padded_vocab_size: int) -> int:
    """Operations of forward and backward per token."""
    attention = attention_flops(seq_length, config.num_attention_heads, config.kv_channels)
    layers = config.num_layers * (layer_products(config) + attention)
    return 3 * (layers + output_products(config, padded_vocab_size))
