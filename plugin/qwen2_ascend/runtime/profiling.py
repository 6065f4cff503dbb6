"""The profiler of a device: torch's, or torch_npu's, which has the same interface."""

from __future__ import annotations

import ctypes
import warnings
from pathlib import Path
from typing import Any


def profiler_fault(device: str) -> str | None:
    """Why no trace would be written on `device`: cpu, cuda or npu; None when there is no reason.

    torch_npu asks CANN when it starts to record. Where CANN has no profiler it prints an error, and
    the run goes on without a trace.
    """
    if device != "npu":
        return None
    name, function = "libmsprofiler.so", "aclprofInit"
    try:
        has_profiler = hasattr(ctypes.CDLL(name), function)
    except OSError:
        has_profiler = False
    if has_profiler:
        return None
    return (
        f"torch_npu's profiler records through CANN's {name}, which is not found or has no "
        f"{function}; install CANN's toolkit and source its set_env.sh, or leave profiling out."
    )


def open_profiler(
    device: str,
    folder: Path,
    worker: str,
    *,
    warmup: int,
    active: int,
    record_shapes: bool = False,
    profile_memory: bool = False,
    with_stack: bool = False,
    level: str = "level0",
) -> Any:
    """A profiler that has not been started: it has `start`, `step` after each step, and `stop`.

    When the steps are over, or at `stop`, it writes `WORKER.*.pt.trace.json` into `folder`, a
    Chrome trace that TensorBoard shows too; on an npu a folder `WORKER_*_ascend_pt`, for MindStudio
    Insight.

    Args:
        device: cpu, cuda or npu.
        folder: where traces go; it is made.
        worker: what the trace is called.
        warmup: steps that start the recording, and are not kept.
        active: steps that are kept.
        record_shapes: of operators' inputs.
        profile_memory: allocations.
        with_stack: the Python lines that called.
        level: how much of an npu's own events: level_none, level0, level1 or level2.
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {
        "record_shapes": record_shapes,
        "profile_memory": profile_memory,
        "with_stack": with_stack,
    }
    profilers: Any = torch.profiler
    if device == "npu":
        import torch_npu  # pyright: ignore[reportMissingImports]

        profilers = torch_npu.profiler
        options["experimental_config"] = _experimental_config(profilers, level)
    kinds = profilers.ProfilerActivity
    activities = [kinds.CPU] + ([getattr(kinds, device.upper())] if device != "cpu" else [])
    with warnings.catch_warnings():
        # the run's first step has nothing before it to warm up on
        warnings.filterwarnings("ignore", message="Profiler won't be using warmup")
        schedule = profilers.schedule(wait=0, warmup=warmup, active=active, repeat=1)
    return profilers.profile(
        activities=activities,
        schedule=schedule,
        on_trace_ready=profilers.tensorboard_trace_handler(str(folder), worker),
        **options,
    )


def _experimental_config(profilers: Any, level: str) -> Any:
    """Metrics of the cores exist from level1 on; torch_npu complains where they are asked below."""
    levels, metrics = profilers.ProfilerLevel, profilers.AiCMetrics
    has_metrics = level in ("level1", "level2")
    chosen = metrics.PipeUtilization if has_metrics else metrics.AiCoreNone
    name = {"level_none": "Level_none"}.get(level, level.capitalize())
    return profilers._ExperimentalConfig(profiler_level=getattr(levels, name), aic_metrics=chosen)
