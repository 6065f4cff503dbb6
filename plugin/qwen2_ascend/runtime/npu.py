"""What megatron-core needs on an Ascend NPU, and what is wrong where none can be used."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qwen2_ascend.errors import UserError
from qwen2_ascend.runtime import diagnosis, mindspeed
from qwen2_ascend.runtime.cpu import cuda_type_name
from qwen2_ascend.runtime.ledger import apply, record

SIMULATED = "TORCH_NPU_SIM_SOC"
"""Set where torch_npu runs on a simulated device, to the chip that it plays."""

_ROOT = Path("/")


def is_installed() -> bool:
    """Whether torch_npu is there, working or not."""
    return importlib.util.find_spec("torch_npu") is not None


def missing() -> str | None:
    """Why no NPU can be used here, with the way out; None when one can."""
    ours = mindspeed.release(torch.__version__)
    if not is_installed():
        return (
            f"torch_npu is not installed; install the release that equals torch: pip install "
            f'"torch_npu=={ours}".'
        )
    theirs = mindspeed.release(importlib.metadata.version("torch_npu"))
    if ours != theirs:
        return (
            f"torch_npu is {theirs} and torch is {ours}; the two releases must be equal: pip "
            f'install "torch=={theirs}", or the torch_npu of {ours}.'
        )
    try:
        torch_npu = importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError) as error:
        return diagnosis.import_fault(str(error), os.environ, _ROOT)
    try:
        count = torch_npu.npu.device_count()
    except RuntimeError as error:
        told = diagnosis.explain(str(error), os.environ)
        return f"torch_npu cannot count its devices: {told or error}"
    return None if count else diagnosis.no_device_fault(os.environ, _ROOT)


def warning(device: str) -> str | None:
    """Why NPUs are not used though they might be meant to, for the log; None when all is as it is.

    Args:
        device: what was chosen instead.
    """
    if is_installed():
        return f"warning: no NPU is used, this runs on the {device}: {missing()}"
    if diagnosis.has_driver(_ROOT):
        return f"warning: this machine has NPUs, and this runs on the {device}: {missing()}"
    return None


def check_process_count(local_processes: int, devices: int) -> None:
    """Every local process needs a card of its own; all of them find out before any waits.

    Raises:
        UserError: there are fewer cards.
    """
    if local_processes <= devices:
        return
    visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    fault = diagnosis.visible_devices_fault(os.environ, None)
    hint = f" (ASCEND_RT_VISIBLE_DEVICES={visible})" if visible is not None else ""
    raise UserError(
        f"{local_processes} processes on this machine and {devices} npu device(s){hint}; start "
        f"with --nproc-per-node {devices}.{f' {fault}' if fault else ''}"
    )


def is_simulated() -> bool:
    """Whether the device is not hardware: nothing that looks like a figure of it may be told.

    A simulation says so, or there is no driver that could show this process a card.
    """
    return SIMULATED in os.environ or not diagnosis.has_driver(_ROOT)


def redirect() -> None:
    """Turns torch.cuda calls into torch.npu calls; before megatron.core is imported."""
    # It warns of what it does, at length, after it has put a filter of its own before all others.
    with warnings.catch_warnings(record=True):
        importlib.import_module("torch_npu.contrib.transfer_to_npu")
    apply(
        "torch:Tensor.type",
        cuda_type_name,
        why="gradient clipping and the distributed optimizer accept torch.cuda.* tensors only",
        how="type() without arguments says torch.cuda.FloatTensor for torch.npu.FloatTensor",
        until="torch_npu.contrib.transfer_to_npu covers Tensor.type()",
    )
    for message in (
        # megatron-core's barriers name no device; ours is the current one
        "barrier.*using the device under current context",
        # of the answer that the environment gives, which torch's broadcast asks for
        "The return value of get_device_capability",
    ):
        warnings.filterwarnings("ignore", message=message)


def activate_mindspeed(arguments: Mapping[str, Any]) -> str:
    """Activates MindSpeed, records what it replaced, and says how much that is."""
    patched = mindspeed.activate(arguments)
    relied_on = mindspeed.relied_on(patched)
    record(
        "mindspeed:megatron_adaptor",
        why="--mindspeed: Ascend's own rewrites of megatron-core",
        how=f"replaces {len(patched)} attributes, among them: {', '.join(relied_on)}",
        until="the run is started with --no-mindspeed",
    )
    _mend_device_capability()
    return f"{len(patched)} attributes replaced"


def activate_adaptor() -> str:
    """Activates MegatronAdaptor, records that, and says what is known of it."""
    mindspeed.activate_adaptor()
    record(
        "megatron_adaptor:",
        why="--mindspeed: Ascend's own rewrites of megatron-core 0.17 and later",
        how="replaces attributes of torch and megatron-core that it keeps no list of",
        until="the run is started with --no-mindspeed",
    )
    return "it keeps no list of what it replaces"


def _mend_device_capability() -> None:
    """Lets MindSpeed's answer be asked as torch does."""
    if not inspect.signature(torch.cuda.get_device_capability).parameters:
        apply(
            "torch:cuda.get_device_capability",
            lambda original: lambda device=None: original(),
            why="MindSpeed 2.3.0's takes no device; torch's broadcast passes one since 2.13",
            how="takes a device and does not look at it",
            until="MindSpeed 2.3.0_core_r0.12.1 is no longer supported",
        )
