"""Where every sublayer's output is seen in a running GPTModel, as each rank has it.

What a hook sees is this rank's piece in Megatron's shapes; `gather.py` makes transformers' of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from qwen2_ascend.alignment.sublayers import EMBEDDING, FINAL_NORM, LOGITS, full_name
from qwen2_ascend.checkpoint.load import unwrap

SEQUENCE, COLUMNS, QKV, GROUPS, GATE_UP = "sequence", "columns", "qkv", "groups", "gate_up"
WHOLE = "whole"
"""How the tensor-parallel ranks share a tensor: along the sequence (under sequence parallelism,
else each has all of it); by columns; by columns of whole query groups; by query groups, of which
several ranks may hold the same; by the same columns of gate and of up; not at all."""


class Tap(NamedTuple):
    """A tensor of a layer that can be seen from outside of a module."""

    name: str
    """The sublayer, or what several are cut from."""
    module: str
    """Path from the layer; "" is the layer itself."""
    argument: int | None
    """Which positional argument it is; None for the output."""
    sharing: str


LAYER_TAPS = (
    Tap("input", "", 0, SEQUENCE),
    Tap("input_layernorm", "input_layernorm", None, SEQUENCE),
    Tap("qkv", "self_attention.linear_qkv", None, QKV),
    Tap("query_rotary", "self_attention.core_attention", 0, COLUMNS),
    Tap("key_rotary", "self_attention.core_attention", 1, GROUPS),
    Tap("core_attention", "self_attention.core_attention", None, COLUMNS),
    Tap("linear_proj", "self_attention.linear_proj", None, SEQUENCE),
    Tap("attention_residual", "pre_mlp_layernorm", 0, SEQUENCE),
    Tap("pre_mlp_layernorm", "pre_mlp_layernorm", None, SEQUENCE),
    Tap("gate_up", "mlp.linear_fc1", None, GATE_UP),
    Tap("swiglu", "mlp.linear_fc2", 0, COLUMNS),
    Tap("linear_fc2", "mlp.linear_fc2", None, SEQUENCE),
    Tap("output", "", None, SEQUENCE),
)

OUTER_TAPS = (
    Tap(EMBEDDING, "embedding", None, SEQUENCE),
    Tap(FINAL_NORM, "decoder.final_layernorm", None, SEQUENCE),
    Tap(LOGITS, "output_layer", None, COLUMNS),
)
"""Paths from the model chunk; a chunk of the middle has none of these modules."""


class Taken(NamedTuple):
    """One rank's piece of a tensor."""

    tensor: torch.Tensor
    """`[s, n * b, features]`; s is this rank's part under sequence parallelism."""
    sharing: str


def places(chunks: Sequence[Any]) -> Iterator[tuple[str, Any, int | None]]:
    """Where the sublayers of this rank's GPTModels, wrapped or not, are seen: for `copied`.

    Names are as `layers.3.qkv`; what is seen there is `[s, b, ...]` of a micro-batch.
    """
    for chunk in chunks:
        model = unwrap(chunk)
        modules = dict(model.named_modules())
        for tap in OUTER_TAPS:
            if tap.module in modules:
                yield tap.name, modules[tap.module], tap.argument
        for layer in model.decoder.layers:
            for tap in LAYER_TAPS:
                name = full_name(layer.layer_number - 1, tap.name)
                yield name, layer.get_submodule(tap.module), tap.argument


def joined(seen: dict[str, list[torch.Tensor]]) -> dict[str, Taken]:
    """Micro-batches side by side."""
    sharing = {tap.name: tap.sharing for tap in (*OUTER_TAPS, *LAYER_TAPS)}
    return {
        name: Taken(torch.cat(tensors, dim=1).flatten(2), sharing[name.rsplit(".", 1)[-1]])
        for name, tensors in seen.items()
    }
