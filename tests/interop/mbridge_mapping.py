"""Runs mbridge's mapping of Qwen2 on a CPU: `mbridge_mapping.py CHECKOUT MODEL SHARDS`.

mbridge makes the weights of each tensor-parallel rank from the Hugging Face folder MODEL, and back.
Both must be what MODEL and SHARDS have; SHARDS is an iteration's folder without pipeline stages.
mbridge's own model is one of Transformer Engine's layers, which a CPU does not have.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from interop.megatron_bridge import prepare

FUSED = {
    ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
}
"""The norms' names in layers of megatron-core's own spec and of Transformer Engine's."""


def main() -> None:
    checkout, model, shards = map(Path, sys.argv[1:])
    prepare(checkout)
    import torch
    from safetensors.torch import load_file

    files = sorted(shards.glob("mp_rank_*/model_optim_rng.pt"))
    ranks = [torch.load(file, weights_only=False)["model"] for file in files]
    weights = load_file(model / "model.safetensors")
    bridge = qwen2_bridge(model, len(ranks))
    seen = set()
    for name in ranks[0]:
        own = [rank[name] for rank in ranks]
        names = bridge._weight_name_mapping_mcore_to_hf(fused(name))
        seen |= set(names)
        check(bridge, fused(name), own, [weights[n] for n in names])
    assert seen == weights.keys(), seen ^ weights.keys()
    print(f"{len(seen)} weights on {len(ranks)} ranks")


def qwen2_bridge(model: Path, tp: int) -> Any:
    import torch
    from transformers import AutoConfig

    states = importlib.import_module("mbridge.core.parallel_states").ParallelStates(tp_size=tp)
    kind = importlib.import_module("mbridge.models.qwen2").Qwen2Bridge
    return kind(AutoConfig.from_pretrained(model), torch.float32, states)


def fused(name: str) -> str:
    for plain, of in FUSED.items():
        if name.endswith(plain):
            return name.removesuffix(plain) + of
    return name


def check(bridge: Any, name: str, own: list[Any], weights: list[Any]) -> None:
    """Compares the ranks' parts of one parameter with the model's weights, both ways."""
    import torch

    whole = bridge._weight_to_mcore_format(name, weights)
    parts = bridge._weight_split_across_tp(name, whole, own[0], len(own))
    assert all(map(torch.equal, parts, own)), name
    is_cut = own[0].shape != whole.shape
    axis = next((i for i, n in enumerate(whole.shape) if n != own[0].shape[i]), 0)
    parameter = SimpleNamespace(tensor_model_parallel=True, partition_dim=axis)
    merged = bridge._weight_merge_across_tp(name, own, parameter) if is_cut else own[0]
    _, back = bridge._weight_to_hf_format(name, merged)
    assert all(map(torch.equal, back, weights)), name


if __name__ == "__main__":
    main()
