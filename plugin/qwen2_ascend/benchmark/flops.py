"""How much arithmetic a training step is, and the share of a device's peak that it reaches.

Per token, a multiplication and its addition counted as two:

    forward = 2 * W + 2 * L * s * np * hn
    step    = 3 * forward

W: the weights that are multiplied with, those of all layers' linear modules and of the output
layer; the embedding is looked up. Attention over s tokens takes 2 * s * np * hn for the scores and
as much for the context, in L layers; causal, half of it. Backward computes the gradients of both
factors of every product, twice the forward. Norms, rotation, softmax and the optimizer are not
counted, nor is what recomputation computes again (MFU of Chowdhery et al. 2022, arXiv:2204.02311,
appendix B, which counts attention as if it were not causal).
"""

from __future__ import annotations

from qwen2_ascend.config import Qwen2Config


def train_flops_per_token(config: Qwen2Config, seq_length: int) -> float:
    """Floating-point operations of forward and backward per token, as the module says."""
    context = config.num_attention_heads * config.kv_channels
    attention = 2 * config.num_layers * seq_length * context
    return 3 * (2 * matmul_weights(config) + attention)


def matmul_weights(config: Qwen2Config) -> int:
    """Weights that every token is multiplied with, the output layer's included."""
    h, width = config.hidden_size, config.kv_channels
    heads, groups = config.num_attention_heads, config.num_query_groups
    attention = (heads + 2 * groups) * width * h + heads * width * h
    layer = attention + 3 * h * config.ffn_hidden_size
    return config.num_layers * layer + config.vocab_size * h


def attention_flops(
    seq_length: int, batch: int, num_heads: int, width: int, *, backward: bool
) -> float:
    """FLOPs of causal attention's scores and context, and in backward of both factors' gradients.

    What a flash kernel computes again in backward does not count.
    """
    forward = 2 * batch * seq_length * seq_length * num_heads * width
    return 3 * forward if backward else forward
