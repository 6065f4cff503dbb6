"""LoRA on transformers' Qwen2: the same adapters as `finetuning.lora`'s, every one of them whole.

A projection gets a submodule `adapter` and keeps its own name, so the base's weights are called as
ever. Values begin as on the Megatron path, and so the losses are the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import dropout, linear

from qwen2_ascend.checkpoint.adapter_rules import LORA_A, LORA_B, peft_name
from qwen2_ascend.checkpoint.formats.peft_adapter import WEIGHTS_FILE, held_tensors
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.finetuning.lora import initial_a
from qwen2_ascend.lora_config import LoraConfig


class Adapter(torch.nn.Module):
    """scaling * B A dropout(x), which a linear module's output gets on top.

    Attributes:
        lora_A: `[rank, in]`
        lora_B: `[out, rank]`, zero at first.
    """

    def __init__(self, first: Tensor, out_features: int, lora: LoraConfig) -> None:
        super().__init__()
        self.scaling, self.dropout_p = lora.scaling, lora.dropout
        self.lora_A = torch.nn.Parameter(first)
        self.lora_B = torch.nn.Parameter(first.new_zeros(out_features, lora.rank))

    def forward(self, x: Tensor) -> Tensor:
        dropped = dropout(x, self.dropout_p, self.training)
        return linear(linear(dropped, self.lora_A) * self.scaling, self.lora_B)


def add_adapters(model: Any, lora: LoraConfig, *, seed: int, **like: Any) -> None:
    """Freezes the model and adds adapters that change nothing yet; before DeepSpeed's engine.

    Args:
        model: transformers' Qwen2ForCausalLM, with its weights.
        lora: the adapters.
        seed: of the values of A.
        **like: their dtype and device.
    """
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in lora.targets:
            first = initial_a(peft_name(f"{name}.weight", "A"), lora.rank, module.in_features, seed)
            module.add_module("adapter", Adapter(first.to(**like), module.out_features, lora))
            # before DeepSpeed's own hooks, which take what leaves the module
            module.register_forward_hook(_add_output)
    # recomputed layers give their adapters no gradients unless an input asks for one
    model.enable_input_require_grads()


def _add_output(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + module.adapter(args[0])


def adapter_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The adapters' parameters by PEFT's names."""
    found = {}
    for name, parameter in model.named_parameters():
        for suffix in (LORA_A, LORA_B):
            if name.endswith(f".{suffix}"):
                found[peft_name(name.removesuffix(suffix) + "weight", suffix[-1])] = parameter
    return found


def read_adapter_tensors(path: Path, config: Qwen2Config, lora: LoraConfig) -> dict[str, Tensor]:
    """A file's tensors in fp32 by PEFT's names.

    Args:
        path: of a PEFT adapter, or of the optimizer's state beside it.

    Raises:
        UserError: the tensors are not those of this adapter and model.
    """
    held_tensors(path, config, lora)
    return {name: tensor.float() for name, tensor in load_file(path).items()}


@torch.no_grad()
def load_adapter(model: torch.nn.Module, config: Qwen2Config, lora: LoraConfig, path: Path) -> None:
    """Fills the adapters from a PEFT folder; before DeepSpeed's engine.

    Raises:
        UserError: it is not of this model.
    """
    read = read_adapter_tensors(path / WEIGHTS_FILE, config, lora)
    for name, parameter in adapter_parameters(model).items():
        parameter.copy_(read[name])
