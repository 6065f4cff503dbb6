"""Qwen2's layer as a megatron-core ModuleSpec; parameter names do not depend on the backend."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
)
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from qwen2_ascend.model.modules import CausalAttention, Qwen2MLP, Qwen2SelfAttention, RMSNorm
from qwen2_ascend.model.overlap import MakeOverlap
from qwen2_ascend.model.tensor_parallel_linear import OverlappedColumnLinear, OverlappedRowLinear
from qwen2_ascend.ops import Ops, get_ops
from qwen2_ascend.runtime import current

TORCH_DIST_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""The norms' names in torch_dist folders, as megatron-core's own layer specs have them, so that
Megatron-LM reads ours and we read its."""


def get_qwen2_layer_spec(
    backend: str = "torch", *, plain: Collection[str] = (), overlap: MakeOverlap | None = None
) -> ModuleSpec:
    """One decoder layer: RMSNorm, attention with QKV bias, RMSNorm, SwiGLU.

    Args:
        backend: whose operators the modules call: "npu" is torch_npu's fused ones, "torch" runs on
            every device.
        plain: names of operators (fields of `Ops`) to take from "torch" all the same.
        overlap: makes the way in which products and exchanges overlap; None keeps megatron-core's
            linear layers.

    Raises:
        UserError: a backend or an operator this release does not have.
    """
    ops = {"ops": get_ops(backend, plain=plain)}
    norm = _norm(ops)
    column, row = _linear_layers(overlap)
    attention = ModuleSpec(
        module=Qwen2SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal, **ops},
        submodules=SelfAttentionSubmodules(
            linear_qkv=column,
            core_attention=ModuleSpec(module=CausalAttention, params=ops),
            linear_proj=row,
        ),
    )
    submodules = MLPSubmodules(linear_fc1=column, linear_fc2=row)
    mlp = ModuleSpec(module=Qwen2MLP, params=ops, submodules=submodules)
    # megatron-core takes functions here too, though its own annotations say types only.
    add_residual: Any = get_bias_dropout_add
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=add_residual,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=add_residual,
            sharded_state_dict_keys_map=TORCH_DIST_NAMES,
        ),
    )


def _norm(ops: dict[str, Ops]) -> ModuleSpec:
    """RMSNorm on this process's device, where megatron-core puts the other weights."""
    return ModuleSpec(module=RMSNorm, params={**ops, "device": current().device})


def _linear_layers(overlap: MakeOverlap | None) -> tuple[ModuleSpec, ModuleSpec]:
    """The column- and the row-parallel one."""
    if overlap is None:
        return ModuleSpec(module=ColumnParallelLinear), ModuleSpec(module=RowParallelLinear)
    params = {"overlap": overlap}
    return (
        ModuleSpec(module=OverlappedColumnLinear, params=params),
        ModuleSpec(module=OverlappedRowLinear, params=params),
    )


def get_qwen2_block_spec(
    num_layers: int,
    backend: str = "torch",
    *,
    plain: Collection[str] = (),
    overlap: MakeOverlap | None = None,
) -> ModuleSpec:
    """The decoder of one model chunk: `num_layers` layers and, in the last chunk, the final norm.

    A layer spec alone would give the final norm megatron-core's default, which has no sequence
    parallelism.
    """
    norm = _norm({"ops": get_ops(backend, plain=plain)})
    layers = [get_qwen2_layer_spec(backend, plain=plain, overlap=overlap)] * num_layers
    return ModuleSpec(
        module=TransformerBlock,
        submodules=TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm),
    )
