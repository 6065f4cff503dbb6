"""transformers' Qwen2, whole and sublayer by sublayer, in any dtype: what the model is held to.

transformers computes RMSNorm and the rotary tables in fp32 whatever its dtype is. `widened` lifts
that, so that fp64 means fp64. Everything runs on the CPU. Activations are `[b, s, features]`.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, Qwen2ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb, eager_attention_forward
from transformers.utils import logging

from qwen2_ascend.alignment.hooks import copied
from qwen2_ascend.alignment.sublayers import (
    EMBEDDING,
    FINAL_NORM,
    LAYER,
    LOGITS,
    LOSS,
    full_name,
)
from qwen2_ascend.checkpoint.readers.base import Source
from qwen2_ascend.checkpoint.transformers_model import load_weights
from qwen2_ascend.inference.opening import config_folder
from qwen2_ascend.pretrained import open_pretrained

Compute = Callable[..., Tensor]
"""A sublayer: from its parents' outputs to its own."""

LAYER_MODULES = {
    # what is recorded: (module, index of a positional argument or None for the output)
    "input_layernorm": ("input_layernorm", None),
    "query": ("self_attn.q_proj", None),
    "key": ("self_attn.k_proj", None),
    "value": ("self_attn.v_proj", None),
    "core_attention": ("self_attn.o_proj", 0),
    "linear_proj": ("self_attn.o_proj", None),
    "attention_residual": ("post_attention_layernorm", 0),
    "pre_mlp_layernorm": ("post_attention_layernorm", None),
    "gate": ("mlp.gate_proj", None),
    "up": ("mlp.up_proj", None),
    "swiglu": ("mlp.down_proj", 0),
    "linear_fc2": ("mlp.down_proj", None),
    "input": ("input_layernorm", 0),
    "output": ("", None),
}
"""Where a layer's sublayers are seen in transformers' own forward; the rotated query and key are
computed from the query and key there, by transformers' functions."""


class Computed(NamedTuple):
    """What one dtype's transformers makes of the tokens."""

    activations: dict[str, Tensor]
    loss: float
    gradients: dict[str, Tensor]


def load_model(source: Source, folder: Path | None, dtype: torch.dtype) -> Any:
    """transformers' Qwen2ForCausalLM with weights of `dtype`, on the CPU, for training.

    Args:
        source: the checkpoint. A Hugging Face folder is loaded by transformers itself, shards by
            this project's table.
        folder: a Hugging Face folder to take instead.
        dtype: the dtype of the weights; wider ones in the file are rounded to it.
    """
    model: Any
    config: Any
    logging.disable_progress_bar()
    if folder is None and source.kind == "hf":
        folder = source.folder
    if folder is not None:
        config = open_pretrained(AutoConfig, folder)
        # without a dtype, fp32 files may be rounded to what config.json says
        release = tuple(int(n) for n in transformers.__version__.split(".")[:2])
        options = {"dtype" if release >= (4, 56) else "torch_dtype": torch.float32}
        model = open_pretrained(
            Qwen2ForCausalLM, folder, config=config, attn_implementation="sdpa", **options
        )
    else:
        config = open_pretrained(AutoConfig, config_folder(source))
        config._attn_implementation = "sdpa"
        model = Qwen2ForCausalLM(config).float()
        load_weights(model, source)
    # not by `Module.to`, which rounds rotary frequencies too, as transformers does not when it
    # loads in 16 bits: at position 30 the angles would be off by a tenth
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.train()


def widened(module: Any, dtype: torch.dtype) -> Any:
    """The same in a wider dtype throughout, in place: fp64 goes through no fp32."""
    module = module.to(dtype)
    for part in module.modules():
        name = type(part).__name__
        if name == "Qwen2RMSNorm":
            part.forward = types.MethodType(_rms_norm, part)
        elif name == "Qwen2RotaryEmbedding":
            part.forward = types.MethodType(_rotary_tables(dtype), part)
    return module


def _rms_norm(self: Any, x: Tensor) -> Tensor:
    variance = x.square().mean(-1, keepdim=True)
    return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon))


def _rotary_tables(dtype: torch.dtype) -> Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """RoPE's formula in `dtype`; of YaRN transformers' own frequencies, which are fp32."""

    def forward(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        frequencies = self.inv_freq.to(dtype)
        if self.rope_type == "default":
            count = len(frequencies)
            exponents = torch.arange(count, dtype=dtype) / count
            frequencies = 1.0 / (_rope_base(self.config) ** exponents)
        angles = position_ids[..., None].to(dtype) * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling

    return forward


def _rope_base(config: Any) -> float:
    """transformers 5 keeps it in `rope_parameters`."""
    rope = getattr(config, "rope_parameters", None)
    return rope["rope_theta"] if rope else config.rope_theta


def compute(
    model: Any,
    tokens: Tensor,
    *,
    with_gradients: bool,
    take: Callable[[str, Tensor], None] | None = None,
) -> Computed:
    """Runs the model as it is and records every sublayer.

    Args:
        model: from `load_model`, perhaps widened.
        tokens: `[n, b, s + 1]`.
        with_gradients: also of the mean loss over all tokens.
        take: called with each parameter's gradient as soon as it is whole; without it they are
            kept and returned. Of a wide model they are much memory together.
    """
    total = 0.0
    gradients: dict[str, Tensor] = {}
    take = take or gradients.__setitem__
    names = {parameter: name for name, parameter in model.named_parameters()}
    with copied(_places(model)) as seen, ExitStack() as taking:
        taking.enter_context(torch.set_grad_enabled(with_gradients))
        for index, batch in enumerate(tokens):
            if with_gradients and index == len(tokens) - 1:
                taking.enter_context(gradients_taken(model, lambda p, x: take(names[p], x)))
            inputs, labels = batch[:, :-1], batch[:, 1:]
            logits = model(inputs, use_cache=False).logits
            seen[LOGITS].append(logits.detach())
            losses = token_losses(logits, labels)
            seen[LOSS].append(losses.detach())
            loss = losses.mean() / len(tokens)
            total += loss.item()
            if with_gradients:
                loss.backward()
    activations = {name: torch.cat(parts) for name, parts in seen.items()}
    _add_rotated(model, activations)
    return Computed(activations, total, gradients)


@contextmanager
def gradients_taken(model: Any, take: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Hands every gradient over in the backward of this block, when it is whole, and drops it.

    Args:
        model: gradients of earlier backwards that are still there are added to.
        take: called with a parameter and its gradient.
    """

    def on_gradient(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        take(parameter, gradient)

    with ExitStack() as hooks:
        for parameter in model.parameters():
            hooks.enter_context(parameter.register_post_accumulate_grad_hook(on_gradient))
        yield


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of every token, `[b, 1, s]`; in fp32 or the logits' dtype, if that is wider."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(labels.shape).unsqueeze(1)


def _places(model: Any) -> Iterator[tuple[str, Any, int | None]]:
    yield EMBEDDING, model.model.embed_tokens, None
    yield FINAL_NORM, model.model.norm, None
    for number, layer in enumerate(model.model.layers):
        for name, (path, argument) in LAYER_MODULES.items():
            yield full_name(number, name), layer.get_submodule(path), argument


def _add_rotated(model: Any, activations: dict[str, Tensor]) -> None:
    for number, layer in enumerate(model.model.layers):
        computes = layer_sublayers(layer, tables(model.model.rotary_emb, activations[EMBEDDING]))
        for name in ("query", "key"):
            x = activations[full_name(number, name)]
            with torch.no_grad():
                rotated = computes[f"{name}_rotary"](x)
            activations[full_name(number, f"{name}_rotary")] = rotated


def tables(rotary_embedding: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, `[1, s, hn]`, in the dtype of x `[b, s, h]`."""
    with torch.no_grad():
        return rotary_embedding(x, torch.arange(x.shape[1]).unsqueeze(0))


def layer_sublayers(
    layer: Any, cos_sin: tuple[Tensor, Tensor], attention: str = "sdpa"
) -> Mapping[str, Compute]:
    """Every sublayer of one decoder layer as a function, made of transformers' own modules.

    Args:
        layer: a Qwen2DecoderLayer.
        cos_sin: what `tables` returns.
        attention: "sdpa" or "eager": which of transformers' attentions.
    """
    attn, mlp = layer.self_attn, layer.mlp
    found = {
        "input": lambda x: x,
        "input_layernorm": layer.input_layernorm,
        "query": attn.q_proj,
        "key": attn.k_proj,
        "value": attn.v_proj,
        "query_rotary": lambda x: _rotated(x, cos_sin),
        "key_rotary": lambda x: _rotated(x, cos_sin),
        "core_attention": lambda q, k, v: _attended(attn, q, k, v, attention),
        "linear_proj": attn.o_proj,
        "attention_residual": torch.add,
        "pre_mlp_layernorm": layer.post_attention_layernorm,
        "gate": mlp.gate_proj,
        "up": mlp.up_proj,
        "swiglu": lambda gate, up: mlp.act_fn(gate) * up,
        "linear_fc2": mlp.down_proj,
        "output": torch.add,
    }
    assert list(found) == [sublayer.name for sublayer in LAYER]
    return found


def other_roundings(layer: Any, tensor_parallel: int) -> Mapping[str, Compute]:
    """Sublayers computed in another order of roundings, as right as transformers' own.

    Megatron adds a bias to a product that is rounded already, where transformers adds it before; of
    a row-parallel product each rank rounds its part before the sum. In 16 bits that is seen.

    Args:
        layer: a Qwen2DecoderLayer.
        tensor_parallel: ranks that share each layer.
    """
    attn, mlp = layer.self_attn, layer.mlp
    found: dict[str, Compute] = {
        name: partial(_product_then_bias, module)
        for name, module in (("query", attn.q_proj), ("key", attn.k_proj), ("value", attn.v_proj))
    }
    if tensor_parallel > 1:
        for name, module in (("linear_proj", attn.o_proj), ("linear_fc2", mlp.down_proj)):
            found[name] = partial(_sum_of_parts, module, tensor_parallel)
    return found


def _product_then_bias(module: Any, x: Tensor) -> Tensor:
    return x @ module.weight.t() + module.bias


def _sum_of_parts(module: Any, count: int, x: Tensor) -> Tensor:
    parts = zip(x.chunk(count, dim=-1), module.weight.chunk(count, dim=-1), strict=True)
    first, *rest = [part @ weight.t() for part, weight in parts]
    for part in rest:
        first = first + part
    return first


def _rotated(x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    heads = _heads(x, cos_sin[0].shape[-1])
    return apply_rotary_pos_emb(heads, heads, *cos_sin)[0].transpose(1, 2).flatten(2)


def _attended(attn: Any, q: Tensor, k: Tensor, v: Tensor, implementation: str) -> Tensor:
    heads = [_heads(x, attn.head_dim) for x in (q, k, v)]
    attend: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
    mask = None
    if implementation == "eager":
        s = q.shape[1]
        lowest = torch.finfo(q.dtype).min
        mask = torch.full((s, s), lowest, dtype=q.dtype).triu(1)[None, None]
        attend = eager_attention_forward
    context, _ = attend(attn, *heads, mask, dropout=0.0, scaling=attn.scaling)
    return context.flatten(2)


def _heads(x: Tensor, width: int) -> Tensor:
    """`[b, s, n * hn]` to `[b, n, s, hn]`."""
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def copy_of(module: Any, dtype: torch.dtype) -> Any:
    """A widened copy of one module, which leaves the model as it is."""
    return widened(copy.deepcopy(module), dtype)
