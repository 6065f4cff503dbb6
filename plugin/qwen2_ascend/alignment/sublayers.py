"""The sublayers of Qwen2 in the order of computation, and what each one is computed from.

Both sides of an alignment are recorded under these names, in transformers' shapes, so that a
record says nothing of the layout it came from: `[b, s, features]`, heads side by side; the loss,
in nats, is one row per sequence, `[b, 1, s]`.
"""

from __future__ import annotations

from typing import NamedTuple


class Sublayer(NamedTuple):
    """One step of the model."""

    name: str
    """The name in records: "embedding", or "layers.3.query" for one of a layer."""
    label: str
    """The name that people read."""
    parents: tuple[str, ...]
    """What it is computed from, in the order of the arguments."""


EMBEDDING, FINAL_NORM, LOGITS, LOSS = "embedding", "final_layernorm", "logits", "loss"

LAYER = (
    Sublayer("input", "layer input", ("previous",)),
    Sublayer("input_layernorm", "input norm", ("input",)),
    Sublayer("query", "query", ("input_layernorm",)),
    Sublayer("key", "key", ("input_layernorm",)),
    Sublayer("value", "value", ("input_layernorm",)),
    Sublayer("query_rotary", "query, rotated", ("query",)),
    Sublayer("key_rotary", "key, rotated", ("key",)),
    Sublayer("core_attention", "core attention", ("query_rotary", "key_rotary", "value")),
    Sublayer("linear_proj", "attention projection", ("core_attention",)),
    Sublayer("attention_residual", "attention residual", ("input", "linear_proj")),
    Sublayer("pre_mlp_layernorm", "pre-MLP norm", ("attention_residual",)),
    Sublayer("gate", "gate", ("pre_mlp_layernorm",)),
    Sublayer("up", "up", ("pre_mlp_layernorm",)),
    Sublayer("swiglu", "SwiGLU", ("gate", "up")),
    Sublayer("linear_fc2", "MLP output", ("swiglu",)),
    Sublayer("output", "layer output", ("attention_residual", "linear_fc2")),
)
"""A decoder layer; its "input" is what arrived, over a pipeline's border or not."""


def sublayers(num_layers: int) -> tuple[Sublayer, ...]:
    """All of a model, with their names and parents in full."""
    found = [Sublayer(EMBEDDING, "embedding", ())]
    previous = EMBEDDING
    for layer in range(num_layers):
        for name, label, parents in LAYER:
            full = tuple(previous if p == "previous" else full_name(layer, p) for p in parents)
            found.append(Sublayer(full_name(layer, name), label, full))
        previous = full_name(layer, "output")
    found.append(Sublayer(FINAL_NORM, "final norm", (previous,)))
    found.append(Sublayer(LOGITS, "logits", (FINAL_NORM,)))
    found.append(Sublayer(LOSS, "loss", (LOGITS,)))
    return tuple(found)


def full_name(layer: int, name: str) -> str:
    """A layer's sublayer in records; layers count from 0 over the whole model."""
    return f"layers.{layer}.{name}"


def split_name(name: str) -> tuple[int | None, str]:
    """(layer, its sublayer), or (None, name) outside the layers."""
    if not name.startswith("layers."):
        return None, name
    _, layer, rest = name.split(".", 2)
    return int(layer), rest


def describe(name: str) -> str:
    """ "layer 3, query", as findings say it; layers count from 0, as in parameter names."""
    layer, short = split_name(name)
    if layer is None:
        return {FINAL_NORM: "final norm"}.get(name, name)
    label = next(x.label for x in LAYER if x.name == short)
    return f"layer {layer}, {label}"
