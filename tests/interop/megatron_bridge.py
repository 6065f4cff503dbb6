"""Runs Megatron-Bridge on a CPU: `megatron_bridge.py CHECKOUT SHARDS MODEL OUTPUT`.

It loads the torch_dist folder SHARDS as a checkpoint of Megatron-LM: it makes the model of the
folder's `args`, loads the weights and writes the model's state to OUTPUT. Its packages import
Transformer Engine and more of NVIDIA's, for which there are stand-ins that compute nothing;
megatron-core is imported before, so that it does without.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import warnings
from pathlib import Path

CORE = (
    "megatron.core.dist_checkpointing",
    "megatron.core.distributed",
    "megatron.core.extensions.transformer_engine",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel.schedules",
)
STAND_INS = (
    "causal_conv1d",
    "flash_attn",
    "mamba_ssm",
    "megatron_energon",
    "modelopt",
    "nvidia_resiliency_ext",
    "qwen_vl_utils",
    "timm",
    "transformer_engine",
    "triton",
    "wandb",
)


def main() -> None:
    checkout, shards, model, output = map(Path, sys.argv[1:])
    prepare(checkout / "src")
    import torch

    loading = importlib.import_module("megatron.bridge.training.model_load_save")
    # of NVIDIA's quantizer, which no checkpoint of ours has
    importlib.import_module("megatron.bridge.training.checkpointing").restore_modelopt_state = (
        lambda *arguments: None
    )
    config, args = loading.load_model_config(str(shards))
    args.tokenizer_model = str(model)  # from which it counts the vocabulary
    config.tensor_model_parallel_size = config.pipeline_model_parallel_size = 1
    config.virtual_pipeline_model_parallel_size = None
    state = loading.build_and_load_model(
        str(shards), config, "gpt", args, return_state_dict=True, use_cpu_init=True
    )
    torch.save({name: value for name, value in state["model"].items()}, output)


def prepare(sources: Path) -> None:
    """Makes the packages in a folder importable that import NVIDIA's."""
    from npusim.stand_ins import StandIns
    from qwen2_ascend.runtime import cpu

    class Packages(StandIns):
        """Those of `packages` that are not installed, at any time."""

        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] not in self.packages:
                return None
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    warnings.simplefilter("ignore")
    cpu.redirect_torch()
    for name in CORE:
        importlib.import_module(name)
    cpu.redirect_megatron()
    absent = {name for name in STAND_INS if importlib.util.find_spec(name) is None}
    sys.meta_path.append(Packages(absent))
    sys.path.insert(0, str(sources))


if __name__ == "__main__":
    main()
