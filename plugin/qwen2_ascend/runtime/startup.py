"""start(): redirects, device and torch.distributed, in the one order that works."""

from __future__ import annotations

import os
from datetime import timedelta

import torch

from qwen2_ascend.errors import UserError
from qwen2_ascend.runtime import cpu, npu
from qwen2_ascend.runtime.device import BACKENDS, Runtime, select_device
from qwen2_ascend.runtime.megatron_compat import silence_known_notes

_current: Runtime | None = None


def start(
    device: str | None = None, *, mindspeed: bool = False, timeout_seconds: float = 600
) -> Runtime:
    """Chooses the device, applies its redirects and joins the process group.

    Works under torchrun and as a single plain process. Called again it returns the same Runtime.

    Args:
        device: cpu, cuda or npu; None takes the best there is.
        mindspeed: activate MindSpeed before megatron-core is imported.
        timeout_seconds: how long a collective may wait for the other ranks.

    Raises:
        UserError: the device cannot be used, MindSpeed is asked for, or torchrun's environment is
            incomplete.
    """
    global _current
    if mindspeed:
        raise UserError(
            "--mindspeed: MindSpeed is not supported by this release; leave the flag out."
        )
    if _current is not None:
        if device not in (None, _current.name):
            raise UserError(f"device={device}: this process already runs on {_current.name}.")
        return _current
    name = select_device(device)
    rank, world_size, local_rank = _place()
    silence_known_notes()
    _redirect(name)
    runtime = Runtime(
        name=name,
        backend=BACKENDS[name],
        device=_own_device(name, local_rank),
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        timeout_seconds=timeout_seconds,
    )
    _join(runtime)
    _current = runtime
    return runtime


def current() -> Runtime:
    """The started Runtime of this process."""
    assert _current is not None, "qwen2_ascend.runtime.start() comes first"
    return _current


def forget(runtime: Runtime) -> None:
    """Lets `start` be called again; `Runtime.close` does it."""
    global _current
    if _current is runtime:
        _current = None


def _redirect(name: str) -> None:
    if name == "cpu":
        cpu.redirect_torch()
        cpu.redirect_megatron()
    elif name == "npu":
        npu.redirect()


def _place() -> tuple[int, int, int]:
    """(rank, world size, local rank) from torchrun, or of a single process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    values = [os.environ.get(name) for name in names]
    if values[1] is None:
        return 0, 1, 0
    if missing := [name for name, value in zip(names, values, strict=True) if value is None]:
        raise UserError(
            f"WORLD_SIZE={values[1]} is set but {', '.join(missing)} is not; start with torchrun, "
            "or unset WORLD_SIZE for a single process."
        )
    rank, world_size, local_rank = (int(value) for value in values if value is not None)
    return rank, world_size, local_rank


def _own_device(name: str, local_rank: int) -> torch.device:
    if name == "cpu":
        return torch.device("cpu")
    module = torch.get_device_module(name)
    if local_rank >= (count := module.device_count()):
        raise UserError(
            f"local rank {local_rank} has no device: this machine has {count} {name} device(s); "
            f"start with --nproc-per-node {count}."
        )
    module.set_device(local_rank)
    return torch.device(name, local_rank)


def _join(runtime: Runtime) -> None:
    if torch.distributed.is_initialized():
        return
    timeout = timedelta(seconds=runtime.timeout_seconds)
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group(runtime.backend, timeout=timeout)
        return
    # A process alone talks to nobody: no port to pick, none to be taken.
    store = torch.distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    torch.distributed.init_process_group(
        runtime.backend, store=store, rank=0, world_size=1, timeout=timeout
    )
