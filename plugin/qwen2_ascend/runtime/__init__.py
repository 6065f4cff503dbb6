"""The device and process groups: the one place that knows cpu, cuda and npu apart.

Everything else asks a `Runtime`. Nothing outside this package touches torch.cuda, torch_npu,
MindSpeed or a backend's name, and every redirect of somebody else's code is in the ledger.

The names below are imported when they are first asked for: `qwen2-ascend doctor` reads tables here
on machines where torch cannot be imported.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from qwen2_ascend.runtime import environment

if TYPE_CHECKING:
    from qwen2_ascend.runtime.device import Runtime, select_device
    from qwen2_ascend.runtime.ledger import applied_patches
    from qwen2_ascend.runtime.megatron_compat import destroy_model_parallel, supported_keywords
    from qwen2_ascend.runtime.startup import current, initialize_model_parallel, start

__all__ = [
    "Runtime",
    "applied_patches",
    "current",
    "destroy_model_parallel",
    "initialize_model_parallel",
    "select_device",
    "start",
    "supported_keywords",
]

_HOMES = {
    "Runtime": "device",
    "applied_patches": "ledger",
    "current": "startup",
    "destroy_model_parallel": "megatron_compat",
    "initialize_model_parallel": "startup",
    "select_device": "device",
    "start": "startup",
    "supported_keywords": "megatron_compat",
}

environment.apply((environment.BEFORE_TORCH,), os.environ)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
