"""The other side of the parity tests: transformers' logits and gradients, and the table's slices.

`exact(model)` lifts the places where transformers goes through fp32 whatever the model's dtype is
(RMSNorm and the rotary tables; its SDPA attention has none), so that fp64 means fp64.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from qwen2_ascend.checkpoint.rules import Shard, TensorSlice, megatron_pieces, qwen2_rules
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.parallel import ParallelLayout


class Answer(NamedTuple):
    """What transformers computes from one folder's weights."""

    tokens: torch.Tensor
    """`[n, b, s]`: n micro-batches."""
    weights: torch.Tensor
    """`[n, b, s, vocabulary]`. The loss of a micro-batch is the sum of its weighted logits: linear,
    so that no cross entropy, which goes through fp32, comes in between."""
    logits: torch.Tensor
    """`[n, b, s, vocabulary]`"""
    gradients: dict[str, torch.Tensor]
    """Gradients of the mean over micro-batches, in transformers' names."""


def ask_transformers(folder: Path, dtype: str, shape: tuple[int, int, int], path: Path) -> None:
    """Writes to `path` the Answer of the model in `folder` for `shape` random tokens.

    Args:
        folder: a Hugging Face folder.
        dtype: fp32, or fp64 throughout.
        shape: micro-batches, sequences in each, tokens in each sequence.
        path: the file.
    """
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    model = exact(model) if dtype == "fp64" else model.float()
    generator = torch.Generator().manual_seed(7)
    vocabulary = model.config.vocab_size
    tokens = torch.randint(vocabulary, shape, generator=generator)
    weights = torch.randn(*shape, vocabulary, generator=generator).to(model.dtype)
    logits = torch.stack([model(batch, use_cache=False).logits for batch in tokens])
    ((logits * weights).sum() / len(tokens)).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    torch.save(Answer(tokens, weights, logits.detach(), gradients)._asdict(), path)


def read_answer(path: Path) -> Answer:
    return Answer(**torch.load(path, weights_only=True))


def exact(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model in fp64, with its own fp32 casts lifted."""
    model = model.double()
    for module in model.modules():
        if type(module).__name__ == "Qwen2RMSNorm":
            module.forward = types.MethodType(_rms_norm, module)
        elif type(module).__name__ == "Qwen2RotaryEmbedding":
            assert module.rope_type == "default"
            module.forward = types.MethodType(_rotary_tables, module)
    return model


def _rms_norm(self, x):
    return self.weight * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.variance_epsilon)


def _rotary_tables(self, x, position_ids):
    width = self.config.head_dim
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    angles = position_ids[..., None] / self.config.rope_parameters["rope_theta"] ** exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def expected_parameters(
    config: Qwen2Config,
    layout: ParallelLayout,
    padded_vocab_size: int,
    shard: Shard,
    tensors: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """One rank's tensors, cut from Hugging Face's (weights or gradients) as the table says."""
    pieces = megatron_pieces(config, layout, padded_vocab_size)[shard]
    rules = {rule.megatron: rule for rule in qwen2_rules(config, padded_vocab_size)}
    return {name: _cut(piece, rules, tensors) for name, piece in pieces.items()}


def _cut(piece: TensorSlice, rules: Mapping, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    words = piece.tensor.split(".")
    layer = next((word for word in words if word.isdigit()), "")
    rule = rules[".".join("{}" if word.isdigit() else word for word in words)]
    dtype = next(iter(tensors.values())).dtype
    view = torch.zeros(rule.view, dtype=dtype)
    for name, box in rule.parts:
        part = view[tuple(slice(*edge) for edge in box)]
        part.copy_(tensors[name.format(layer)].view(part.shape))
    return view[tuple(slice(*edge) for edge in piece.box)].reshape(piece.shape)
