"""start(): environment, redirects, device and torch.distributed, in the one order that works.

The started Runtime is kept here, as torch keeps its process group: `current()` gives it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch

from qwen2_ascend.errors import Faults, UserError
from qwen2_ascend.machine import local_world_size
from qwen2_ascend.parallel import ParallelLayout
from qwen2_ascend.runtime import cpu, diagnosis, environment, mindspeed, npu
from qwen2_ascend.runtime.agreement import raise_together, require_equal
from qwen2_ascend.runtime.device import BACKENDS, Runtime, select_device
from qwen2_ascend.runtime.ledger import apply
from qwen2_ascend.runtime.meeting import Meeting, leave, meet
from qwen2_ascend.runtime.megatron_compat import (
    prepare_buckets,
    prepare_import,
    virtual_pipeline_size,
)

_current: Runtime | None = None


def start(
    device: str | None = None,
    *,
    mindspeed: bool | None = None,
    timeout_seconds: float = 600,
    deterministic: bool = False,
    megatron_arguments: Mapping[str, Any] | None = None,
) -> Runtime:
    """Chooses the device, applies its redirects and joins the process group.

    Works under torchrun and as a single plain process. Called again it returns the same Runtime.

    Args:
        device: cpu, cuda or npu; None takes the best there is.
        mindspeed: True activates MindSpeed or fails, False does not, None takes it where it fits.
        timeout_seconds: how long a collective may wait for the other ranks.
        deterministic: the same bits every time, from operators and collectives.
        megatron_arguments: what MindSpeed is to know of the run, by Megatron's argument names.

    Raises:
        UserError: the device, MindSpeed or the other ranks cannot be had, or torchrun's environment
            is incomplete.
    """
    global _current
    if _current is not None:
        if device not in (None, _current.name):
            raise UserError(f"device={device}: this process already runs on {_current.name}.")
        return _current
    meeting = meet(timeout_seconds)
    notes = _prepare_environment(device, timeout_seconds, deterministic)
    name = _common_device(device)
    if device is None and name != "npu" and (warning := npu.warning(name)):
        notes = [warning]
    elif name != "npu":
        notes = []
    prepare_import()
    notes += _redirect(name, mindspeed, megatron_arguments or {})
    _current = _started(name, meeting, timeout_seconds, deterministic, notes)
    return _current


def current() -> Runtime:
    """The started Runtime of this process."""
    assert _current is not None, "qwen2_ascend.runtime.start() comes first"
    return _current


def _forget(runtime: Runtime) -> None:
    """Lets `start` be called again."""
    global _current
    if _current is runtime:
        _current = None
        leave()


def initialize_model_parallel(layout: ParallelLayout, num_layers: int) -> None:
    """Builds megatron-core's process groups for `layout`; what is left over is data parallel.

    Args:
        layout: sizes of the cut; checked against the model by `ParallelLayout.check`.
        num_layers: of the whole model, which with `layout` gives the virtual pipeline size.

    Raises:
        UserError: the layout's sizes do not divide the number of processes.
    """
    from megatron.core import parallel_state

    runtime = current()
    if runtime.world_size % layout.model_size:
        raise UserError(layout.world_fault(runtime.world_size))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=virtual_pipeline_size(layout, num_layers),
        context_parallel_size=layout.cp,
        # a number of any kind: it goes into a timedelta
        distributed_timeout_minutes=runtime.timeout_seconds / 60,  # pyright: ignore[reportArgumentType]
    )
    prepare_buckets()


def explain(error: BaseException) -> str | None:
    """What an error of the device's software means and what to do; None when it is unknown."""
    return _current.explain(error) if _current is not None else None


def _common_device(requested: str | None) -> str:
    """`select_device` on every rank; where one cannot, or chooses another, no rank goes on."""
    faults = Faults()
    name = faults.collect(lambda: select_device(requested))
    raise_together(faults)
    assert name is not None
    missing = npu.missing() if requested is None and name != "npu" else None
    require_equal(f"what --device {requested or 'auto'} gives", name, note=missing or "")
    return name


def _prepare_environment(
    device: str | None, timeout_seconds: float, deterministic: bool
) -> list[str]:
    """Sets what torch_npu, CANN and HCCL read when they come up; one line about it."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if device not in (None, "npu") or not npu.is_installed():
        return []
    variables = environment.wanted(timeout_seconds, deterministic=deterministic)
    chosen = environment.apply(variables, os.environ)
    return [environment.describe(variables, chosen, os.environ)]


def _redirect(
    name: str, with_mindspeed: bool | None, megatron_arguments: Mapping[str, Any]
) -> list[str]:
    """Redirects torch.cuda before megatron-core is imported; what to say about MindSpeed."""
    if name == "cpu":
        cpu.redirect_torch()
        cpu.redirect_megatron()
    elif name == "npu":
        npu.redirect()
    stack = mindspeed.current_stack(torch.__version__)
    found, adaptor = mindspeed.find(), mindspeed.find_adaptor()
    choice = mindspeed.choose(with_mindspeed, name, found, stack, adaptor)
    if choice.active and choice.package == "megatron_adaptor":
        return [f"MindSpeed: {choice.why}; {npu.activate_adaptor()}"]
    if choice.active:
        return [f"MindSpeed: {choice.why}; {npu.activate_mindspeed(megatron_arguments)}"]
    return [f"MindSpeed: {choice.why}"] if name == "npu" else []


def _started(
    name: str,
    meeting: Meeting,
    timeout_seconds: float,
    deterministic: bool,
    notes: list[str],
) -> Runtime:
    group_seconds = timeout_seconds
    if name == "npu":
        group_seconds = environment.group_timeout_seconds(timeout_seconds, os.environ)
    faults = Faults()
    device = faults.collect(lambda: _own_device(name, meeting.local_rank))
    raise_together(faults)
    assert device is not None
    runtime = Runtime(
        name=name,
        backend=BACKENDS[name],
        device=device,
        rank=meeting.rank,
        world_size=meeting.world_size,
        local_rank=meeting.local_rank,
        timeout_seconds=group_seconds,
        simulated=name == "npu" and npu.is_simulated(),
        notes=tuple(notes),
        on_close=_forget,
    )
    torch.use_deterministic_algorithms(deterministic)
    try:
        _join(runtime, meeting)
    except (RuntimeError, torch.distributed.DistError) as error:
        if told := diagnosis.explain(str(error), os.environ):
            raise UserError([f"the ranks cannot be joined: {told}", str(error)]) from error
        raise
    return runtime


def _own_device(name: str, local_rank: int) -> torch.device:
    if name == "cpu":
        return torch.device("cpu")
    module = torch.get_device_module(name)
    count = module.device_count()
    processes = max(local_rank + 1, local_world_size(1))
    if name == "npu":
        npu.check_process_count(processes, count)
    elif processes > count:
        raise UserError(
            f"{processes} processes on this machine and {count} {name} device(s); start with "
            f"--nproc-per-node {count}."
        )
    module.set_device(local_rank)
    return torch.device(name, local_rank)


def _join(runtime: Runtime, meeting: Meeting) -> None:
    if torch.distributed.is_initialized():
        return
    _limit_default_timeouts()
    torch.distributed.init_process_group(
        runtime.backend,
        store=meeting.store,
        rank=runtime.rank,
        world_size=runtime.world_size,
        timeout=timedelta(seconds=runtime.timeout_seconds),
    )
    if runtime.world_size > 1 and runtime.name != "cpu":
        _connect_cards(runtime)


def _limit_default_timeouts() -> None:
    apply(
        "torch.distributed.distributed_c10d:_get_default_timeout",
        lambda original: (
            lambda backend: (
                original(backend)
                if _current is None
                else timedelta(seconds=_current.timeout_seconds)
            )
        ),
        why="groups that are made without a time-out (DeepSpeed's, torch's own) wait 10 or 30 "
        "minutes for a rank that is lost, whatever --distributed-timeout-minutes says",
        how="gives the time-out of this run",
        until="torch lets the default time-out be set",
    )


def _connect_cards(runtime: Runtime) -> None:
    """The first collective: only now the cards connect, and this is where that can be explained."""
    count = torch.ones(1, device=runtime.device)
    torch.distributed.all_reduce(count)
    if count.item() != runtime.world_size:
        raise RuntimeError(
            f"{runtime.backend} cannot be trusted: the sum of 1 over {runtime.world_size} ranks is "
            f"{count.item()}."
        )
