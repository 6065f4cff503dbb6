"""The device and process groups: the one place that knows cpu, cuda and npu apart.

Everything else asks a `Runtime`. Nothing outside this package touches torch.cuda, torch_npu,
MindSpeed or a backend's name, and every redirect of somebody else's code is in the ledger.
"""

from qwen2_ascend.runtime.device import Runtime, select_device
from qwen2_ascend.runtime.ledger import Patch, applied_patches
from qwen2_ascend.runtime.megatron_compat import (
    destroy_model_parallel,
    initialize_model_parallel,
    supported_keywords,
)
from qwen2_ascend.runtime.startup import current, start

__all__ = [
    "Patch",
    "Runtime",
    "applied_patches",
    "current",
    "destroy_model_parallel",
    "initialize_model_parallel",
    "select_device",
    "start",
    "supported_keywords",
]
