"""The mapping table of LoRA adapters, PEFT's tensors and Megatron's: derived from that of weights.

A module's lora_A stacks the A of its targets, its lora_B has a row for each of the weight's rows
and is cut as the weight is. Every view is `[blocks, rows, columns]` again (`r` is the rank):

    linear_qkv   A [targets, r, h]            B [ng, (np/ng + 2) hn, r]
    linear_fc1   A [targets, r, h]            B [2, f, r]
    linear_proj  A [1, r, np hn], by columns  B [1, h, r]; linear_fc2 the same with f columns

Rows of B that belong to no target have no name in PEFT and are zero.
"""

from __future__ import annotations

from dataclasses import replace

from qwen2_ascend.checkpoint.rules import BY_COLUMNS, Rule, Shard, TensorSlice, qwen2_rules
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.lora_config import PROJECTIONS, LoraConfig
from qwen2_ascend.parallel import ParallelLayout

LORA_A, LORA_B = "adapter.lora_A", "adapter.lora_B"
"""What the parameters are called in a Megatron module."""
PEFT_PREFIX = "base_model.model."


def projection(name: str) -> str:
    """The projection of a Hugging Face or PEFT tensor: `q_proj` of `...self_attn.q_proj.weight`."""
    return next((word for word in name.split(".") if word in PROJECTIONS), "")


def target_rules(config: Qwen2Config, lora: LoraConfig) -> tuple[Rule, ...]:
    """The rules of the weights that get an adapter, with only the targets' parts."""
    rules = []
    for rule in qwen2_rules(config):
        parts = tuple(part for part in rule.parts if projection(part[0]) in lora.targets)
        if rule.megatron.endswith(".weight") and parts:
            rules.append(replace(rule, parts=parts))
    return tuple(rules)


def adapter_rules(config: Qwen2Config, lora: LoraConfig) -> tuple[Rule, ...]:
    """A layer's rules: A and B of every module that has a target."""
    return tuple(
        rule
        for weight in target_rules(config, lora)
        for rule in (_rule_a(weight, lora.rank), _rule_b(weight, lora.rank))
    )


def peft_pieces(config: Qwen2Config, lora: LoraConfig) -> dict[str, TensorSlice]:
    """Every tensor of the PEFT adapter by name, in the order of the model."""
    rules = adapter_rules(config, lora)
    return {
        name.format(layer): rule.piece(box, layer)
        for layer in range(config.num_layers)
        for rule in rules
        for name, box in rule.parts
    }


def adapter_pieces(
    config: Qwen2Config, lora: LoraConfig, layout: ParallelLayout
) -> dict[Shard, dict[str, TensorSlice]]:
    """Every rank's adapter tensors under their parameters' names, layers numbered in the chunk."""
    rules = adapter_rules(config, lora)
    pieces = {}
    for tp_rank in range(layout.tp):
        boxes = [(rule, rule.shard(layout.tp, tp_rank)) for rule in rules]
        for stage, chunks in enumerate(layout.stages(config.num_layers)):
            for chunk, layers in enumerate(chunks):
                pieces[Shard(tp_rank, stage, chunk)] = {
                    rule.megatron.format(local): rule.piece(box, layer)
                    for local, layer in enumerate(layers)
                    for rule, box in boxes
                }
    return pieces


def _rule_a(weight: Rule, rank: int) -> Rule:
    columns = weight.view[2]
    return Rule(
        megatron=weight.megatron.removesuffix("weight") + LORA_A,
        parts=tuple(
            (peft_name(name, "A"), ((i, i + 1), (0, rank), (0, columns)))
            for i, (name, _) in enumerate(weight.parts)
        ),
        view=(len(weight.parts), rank, columns),
        shard_axis=BY_COLUMNS if weight.shard_axis == BY_COLUMNS else None,
    )


def _rule_b(weight: Rule, rank: int) -> Rule:
    return Rule(
        megatron=weight.megatron.removesuffix("weight") + LORA_B,
        parts=tuple((peft_name(name, "B"), (*box[:2], (0, rank))) for name, box in weight.parts),
        view=(*weight.view[:2], rank),
        shard_axis=None if weight.shard_axis == BY_COLUMNS else weight.shard_axis,
    )


def peft_name(name: str, matrix: str) -> str:
    """PEFT's name of the matrix "A" or "B" that belongs to a Hugging Face weight."""
    return f"{PEFT_PREFIX}{name.removesuffix('weight')}lora_{matrix}.weight"
