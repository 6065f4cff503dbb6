"""What megatron-core needs on an Ascend NPU: torch_npu's own transfer and two additions."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os

from qwen2_ascend.runtime.cpu import cuda_type_name
from qwen2_ascend.runtime.ledger import Patch, apply


def missing() -> str | None:
    """Why no NPU can be used here, or None when one can."""
    import torch

    if importlib.util.find_spec("torch_npu") is None:
        return (
            "torch_npu is not installed; install the release that equals torch "
            f"{torch.__version__}."
        )
    ours = _release(torch.__version__)
    theirs = _release(importlib.metadata.version("torch_npu"))
    if ours != theirs:
        return f"torch_npu is {theirs} and torch is {ours}; the two releases must be equal."
    try:
        torch_npu = importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError) as error:
        return f"torch_npu cannot be imported ({error}); is CANN's set_env.sh sourced?"
    if torch_npu.npu.device_count() == 0:
        return "torch_npu sees no device; check `npu-smi info` and ASCEND_RT_VISIBLE_DEVICES."
    return None


def redirect() -> None:
    """Turns torch.cuda calls into torch.npu calls; before megatron.core is imported."""
    importlib.import_module("torch_npu.contrib.transfer_to_npu")
    apply(
        Patch(
            target="torch:Tensor.type",
            why="gradient clipping and the distributed optimizer accept torch.cuda.* tensors only",
            how="type() without arguments says torch.cuda.FloatTensor for torch.npu.FloatTensor",
            until="torch_npu.contrib.transfer_to_npu covers Tensor.type()",
        ),
        cuda_type_name,
    )
    # torch's object broadcast asks for a CUDA device capability, which torch_npu reads from here.
    os.environ.setdefault("TORCH_NPU_DEVICE_CAPABILITY", "9.0")


def _release(version: str) -> str:
    """2.7.1.post2 and 2.7.1+cpu are release 2.7.1."""
    return ".".join(version.split("+")[0].split(".")[:3])
