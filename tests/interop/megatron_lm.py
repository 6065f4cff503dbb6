"""Runs Megatron-LM's pretrain_gpt.py inside the simulation: `megatron_lm.py [ARGUMENTS...]`.

It is imported from the checkout on the path. What it needs there is NVIDIA's or compiled:

- torch.cuda and `Tensor.type()` answer for the NPU, as in our own runtime;
- the card says that it is of generation 8, for which Megatron-LM has no special case;
- its fused CUDA kernels are not compiled, nor are its helpers for indices, which come from pip's
  megatron-core;
- before it loads torch_dist, release 0.12 asks for the version of Transformer Engine, which is
  answered as if it were new;
- release 0.12 calls a function of torch's that takes one argument more by now;
- HCCL has no fp64 sum: the sum is made in fp32;
- a child that it starts, to write torch_dist, does not run this script again.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import multiprocessing.spawn
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

HELPERS = "megatron.core.datasets.helpers_cpp"


def main() -> None:
    from qwen2_ascend.runtime import megatron_compat, npu

    npu.redirect()
    redirect_torch()
    import_helpers()
    keep_children_from_this_script()
    megatron_compat.prepare_torch_dist()
    importlib.import_module("megatron.core.datasets.utils").compile_helpers = lambda: None
    importlib.import_module("megatron.legacy.fused_kernels").load = lambda args: None
    checkpointing = importlib.import_module("megatron.training.checkpointing")
    checkpointing.is_te_min_version = lambda *arguments: True
    checkout = Path(importlib.import_module("megatron.training").__file__ or "").parents[2]
    sys.argv[0] = str(checkout / "pretrain_gpt.py")
    runpy.run_path(sys.argv[0], run_name="__main__")


def redirect_torch() -> None:
    import torch

    properties = torch.cuda.get_device_properties

    @functools.wraps(properties)
    def with_generation(*arguments, **options):
        return SimpleNamespace(major=8, minor=0, total_memory=properties(0).total_memory)

    torch.cuda.get_device_properties = with_generation
    all_reduce = torch.distributed.all_reduce

    @functools.wraps(all_reduce)
    def in_fp32(tensor, *arguments, **options):
        if tensor.dtype != torch.float64 or tensor.device.type == "cpu":
            return all_reduce(tensor, *arguments, **options)
        single = tensor.float()
        all_reduce(single, *arguments, **options)
        return tensor.copy_(single)

    torch.distributed.all_reduce = in_fp32


def keep_children_from_this_script() -> None:
    prepare = multiprocessing.spawn.get_preparation_data

    def without_main(name: str) -> dict[str, object]:
        return {key: of for key, of in prepare(name).items() if not key.startswith("init_main")}

    multiprocessing.spawn.get_preparation_data = without_main


def import_helpers() -> None:
    """Gives the checkout the compiled module of the installed megatron-core."""
    files = importlib.metadata.files("megatron-core") or []
    path = next(file.locate() for file in files if file.match("*/datasets/helpers_cpp*.so"))
    spec = importlib.util.spec_from_file_location(HELPERS, str(path))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[HELPERS] = module


if __name__ == "__main__":
    main()
