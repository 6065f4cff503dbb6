"""Every rank's tensors, made naively of a Hugging Face model's: the reference for the layout.

It works on whole arrays, without boxes, and shares nothing with the package: it was written from
the prose description of the layout, before its author had read the mapping table. A mistake would
have to be made twice to pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qwen2_ascend.config import Qwen2Config

Arrays = Mapping[str, np.ndarray]


def interleaved_qkv(hf: Arrays, layer: str, kind: str, config: Qwen2Config) -> np.ndarray:
    """The q heads of each query group, then its k head, then its v head."""
    width, per_group = config.kv_channels, config.num_attention_heads // config.num_query_groups
    rows = []
    for group in range(config.num_query_groups):
        for head in range(group * per_group, (group + 1) * per_group):
            rows.append(hf[f"{layer}self_attn.q_proj.{kind}"][head * width : (head + 1) * width])
        rows.append(hf[f"{layer}self_attn.k_proj.{kind}"][group * width : (group + 1) * width])
        rows.append(hf[f"{layer}self_attn.v_proj.{kind}"][group * width : (group + 1) * width])
    return np.concatenate(rows)


def layer_shard(
    hf: Arrays, number: int, config: Qwen2Config, rank: int, size: int
) -> dict[str, np.ndarray]:
    layer = f"model.layers.{number}."

    def part(array: np.ndarray, axis: int) -> np.ndarray:
        return np.array_split(array, size, axis)[rank]

    gate, up = hf[layer + "mlp.gate_proj.weight"], hf[layer + "mlp.up_proj.weight"]
    return {
        "input_layernorm.weight": hf[layer + "input_layernorm.weight"],
        "self_attention.linear_qkv.weight": part(interleaved_qkv(hf, layer, "weight", config), 0),
        "self_attention.linear_qkv.bias": part(interleaved_qkv(hf, layer, "bias", config), 0),
        "self_attention.linear_proj.weight": part(hf[layer + "self_attn.o_proj.weight"], 1),
        "pre_mlp_layernorm.weight": hf[layer + "post_attention_layernorm.weight"],
        "mlp.linear_fc1.weight": np.concatenate([part(gate, 0), part(up, 0)]),
        "mlp.linear_fc2.weight": part(hf[layer + "mlp.down_proj.weight"], 1),
    }


def stage_layers(
    num_layers: int, stages: int, per_chunk: int | None, uneven: Sequence[int] | None
) -> list[list[list[int]]]:
    """Layer numbers as [stage][chunk][position]."""
    if uneven is not None:
        starts = [sum(uneven[:stage]) for stage in range(stages)]
        return [[list(range(starts[s], starts[s] + uneven[s]))] for s in range(stages)]
    if per_chunk is None:
        return stage_layers(num_layers, stages, None, [num_layers // stages] * stages)
    result = []
    for stage in range(stages):
        chunks = []
        for chunk in range(num_layers // stages // per_chunk):
            first = (chunk * stages + stage) * per_chunk
            chunks.append(list(range(first, first + per_chunk)))
        result.append(chunks)
    return result


def reference_models(
    hf: Arrays,
    config: Qwen2Config,
    tensor_parallel: int = 1,
    stages: int = 1,
    per_chunk: int | None = None,
    uneven: Sequence[int] | None = None,
    padded: int | None = None,
) -> dict[tuple[int, int, int], dict[str, np.ndarray]]:
    """Tensors by name, of each (tensor-parallel rank, stage, chunk)."""

    def vocabulary(name: str, rank: int) -> np.ndarray:
        extra = ((0, (padded or config.vocab_size) - config.vocab_size), (0, 0))
        return np.array_split(np.pad(hf[name], extra), tensor_parallel)[rank]

    tied = config.tie_word_embeddings
    layers = stage_layers(config.num_layers, stages, per_chunk, uneven)
    models: dict = {}
    for rank in range(tensor_parallel):
        for stage in range(stages):
            for chunk, numbers in enumerate(layers[stage]):
                model = models[rank, stage, chunk] = {}
                if stage == 0 and chunk == 0:
                    embedding = vocabulary("model.embed_tokens.weight", rank)
                    model["embedding.word_embeddings.weight"] = embedding
                for local, number in enumerate(numbers):
                    layer = layer_shard(hf, number, config, rank, tensor_parallel)
                    model |= {f"decoder.layers.{local}.{name}": a for name, a in layer.items()}
                if stage == stages - 1 and chunk == len(layers[stage]) - 1:
                    model["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
                    if not tied or stages > 1:
                        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
                        model["output_layer.weight"] = vocabulary(name, rank)
    return models
