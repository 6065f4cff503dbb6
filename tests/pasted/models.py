"""The models that the published command lines are for, and the same lines for a tiny one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from pasted.command_lines import CommandLine
from qwen2_ascend.checkpoint.adapter_rules import peft_pieces
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.lora_config import LoraConfig

NAMES = {
    "deepseek_r1_distill_qwen": "DeepSeek-R1-Distill-Qwen-{}",
    "qwen2": "Qwen2-{}",
    "qwen25_coder": "Qwen2.5-Coder-{}",
    "qwen25_math": "Qwen2.5-Math-{}",
    "qwq": "QwQ-{}",
}
"""The name of the model by a line's folder; else it is Qwen2.5's base model."""
NOT_ITS_OWN = {"tune_distill_qwen_14b_full": "Qwen2.5-14B-Instruct"}
"""Lines whose --norm-epsilon is not their model's, with a model that it is of."""
SHAPE = {
    "--num-layers": "num_layers",
    "--hidden-size": "hidden_size",
    "--ffn-hidden-size": "ffn_hidden_size",
    "--num-attention-heads": "num_attention_heads",
    "--num-query-groups": "num_query_groups",
    "--padded-vocab-size": "vocab_size",
    "--max-position-embeddings": "max_position_embeddings",
    "--seq-length": "max_position_embeddings",
    "--norm-epsilon": "norm_epsilon",
    "--rotary-base": "rotary_base",
}


def config_of(line: CommandLine) -> Qwen2Config:
    """The published config of the model that a line's folder, size and epsilon are of."""
    _, family, script = line.name.split("/")
    if script in NOT_ITS_OWN:
        return Qwen2Config.named(NOT_ITS_OWN[script])
    name = NAMES.get(family, "Qwen2.5-{}").format(line.size)
    is_large = float(line.size.removesuffix("B")) >= 14 and family != "deepseek_r1_distill_qwen"
    epsilon = line.values("--norm-epsilon") if "--norm-epsilon" in line.flags else ["1e-5"]
    # that of a large model tuned to follow instructions
    return Qwen2Config.named(name + "-Instruct" * (is_large and float(epsilon[0]) == 1e-6))


def scaled(flags: list[str], config: Qwen2Config, **changes: object) -> list[str]:
    """A line's flags with the shape of a tiny model, and with other values of some flags.

    Args:
        flags: of a line.
        config: the tiny model's.
        **changes: values by flag, as tensor_model_parallel_size=2; None takes the flag out.
    """
    values: dict[str, object] = {}
    for flag, name in SHAPE.items():
        value = getattr(config, name)
        values[flag] = f"{value:g}" if isinstance(value, float) else value
    values |= {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    words: list[str] = []
    given = iter(flags)
    for word in given:
        value = values.get(word, "")
        if value == "":
            words.append(word)
            continue
        next(given)
        words += [] if value is None else [word, str(value)]
    return words


def tiny_line(
    line: CommandLine, config: Qwen2Config, paths: dict[str, str | Path], **changes: object
) -> list[str]:
    """A line's flags for a tiny model in `paths`, in one process that computes on the CPU."""
    sizes = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
    words = line.with_paths({"--tokenizer-name-or-path": paths["--load"], **paths})
    changes = {**sizes, "num_layer_list": None, **changes}
    return [*scaled(words, config, **changes), "--device", "cpu"]


def save_adapter(folder: Path, config: Qwen2Config, lora: LoraConfig, seed: int = 3) -> Path:
    """A PEFT adapter whose matrices are not zero."""
    folder.mkdir()
    random = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(piece.shape, generator=random) * 0.3
        for name, piece in peft_pieces(config, lora).items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(lora.to_peft("base")))
    return folder
