"""Hooks that take every sublayer's output out of a running GPTModel, as each rank has it.

What a hook sees is this rank's piece in Megatron's shapes; `gather.py` makes transformers' of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


@contextmanager
def capturing(chunks: Sequence[Any]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Fills a dict, for the length of the block, with what every forward of `chunks` computes.

    Args:
        chunks: this rank's GPTModels, wrapped or not.

    Yields:
        By name (`layers.3.qkv`), one `[s, b, ...]` per micro-batch, in their order.
    """
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)
    handles = []
    try:
        for chunk in chunks:
            model = unwrap(chunk)
            for tap in OUTER_TAPS:
                if (module := _submodule(model, tap.module)) is not None:
                    handles.append(_attach(module, tap, seen[tap.name]))
            for layer in model.decoder.layers:
                for tap in LAYER_TAPS:
                    name = full_name(layer.layer_number - 1, tap.name)
                    module = _submodule(layer, tap.module)
                    handles.append(_attach(module, tap, seen[name]))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def joined(seen: dict[str, list[torch.Tensor]]) -> dict[str, Taken]:
    """Micro-batches side by side."""
    sharing = {tap.name: tap.sharing for tap in (*OUTER_TAPS, *LAYER_TAPS)}
    return {
        name: Taken(torch.cat(tensors, dim=1).flatten(2), sharing[name.rsplit(".", 1)[-1]])
        for name, tensors in seen.items()
    }


def _attach(module: Any, tap: Tap, into: list[torch.Tensor]) -> Any:
    """Copies at once: what follows may write into the tensor."""

    def on_output(_module: Any, _arguments: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        into.append(tensor.detach().clone())

    def on_input(_module: Any, arguments: Any, keywords: Any) -> None:
        # a TransformerBlock hands its layers everything by name
        tensor = arguments[tap.argument] if arguments else keywords["hidden_states"]
        into.append(tensor.detach().clone())

    if tap.argument is None:
        return module.register_forward_hook(on_output)
    return module.register_forward_pre_hook(on_input, with_kwargs=True)


def _submodule(module: Any, path: str) -> Any:
    for name in path.split(".") if path else ():
        module = getattr(module, name, None)
    return module
