"""Environment variables that an Ascend NPU wants, each with its reason; set only where unset.

torch_npu, CANN and HCCL read most of them once, when they come up: so they are set before torch_npu
is imported. The standard library alone is imported here; `qwen2-ascend doctor` shows the table.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from qwen2_ascend.errors import raise_if

CONNECT_SECONDS = (120, 7200)
"""What HCCL_CONNECT_TIMEOUT may be."""
GROUP_MARGIN_SECONDS = 60
"""How much later than HCCL torch gives up: HCCL's own report names the rank that is missing."""
DEFAULT_EXEC_SECONDS = 1836
"""HCCL_EXEC_TIMEOUT where nobody sets it."""


class Variable(NamedTuple):
    """One environment variable."""

    name: str
    value: str
    why: str
    """What it does, and why it has this value."""
    source: str
    """Where it is documented."""
    unless: tuple[str, ...] = ()
    """Other variables that rule this one out."""


_TORCH_NPU = "Ascend/pytorch docs/zh/api/environment_variable"
_CANN = "CANN environment variable reference"

RECOMMENDED = (
    Variable(
        "TASK_QUEUE_ENABLE",
        "2",
        "two threads prepare and launch operators (1, torch_npu's default); with 2 the second "
        "thread also allocates workspaces. It hides the host's time; peak memory may rise",
        f"{_TORCH_NPU}/op_execution/TASK_QUEUE_ENABLE.md",
    ),
    Variable(
        "CPU_AFFINITY_CONF",
        "1",
        "keeps each rank on its own CPU cores; set 0 if something else binds ranks to cores",
        f"{_TORCH_NPU}/performance_tuning/CPU_AFFINITY_CONF.md",
    ),
    Variable(
        "PYTORCH_NPU_ALLOC_CONF",
        "expandable_segments:True",
        "memory segments grow instead of fragmenting, so less memory is reserved and unused; needs "
        "driver 23.0.0",
        f"{_TORCH_NPU}/memory_management/PYTORCH_NPU_ALLOC_CONF.md",
        # torch_npu refuses both of the first; the second means that there are no segments
        unless=("PYTORCH_ALLOC_CONF", "PYTORCH_NO_NPU_MEMORY_CACHING"),
    ),
    Variable(
        "TORCH_NPU_DEVICE_CAPABILITY",
        "9.0",
        "makes torch.cuda.get_device_capability() return 9.0; without it the answer is None, which "
        "breaks torch 2.13's broadcast. It is no property of the hardware; MindSpeed uses the same "
        "value, which also makes that broadcast send fp8 as bytes, as HCCL needs it",
        f"{_TORCH_NPU}/device_management/TORCH_NPU_DEVICE_CAPABILITY.md",
    ),
)

BEFORE_TORCH = Variable(
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
    "0",
    "torch does not import torch_npu by itself. This project imports it after it has set these "
    "variables; if torch_npu is broken, torch still works and the reason can be shown",
    "torch, docs on out-of-tree extension autoloading",
)
"""Set by the import of `qwen2_ascend.runtime`, which comes before that of torch."""

DETERMINISTIC = (
    Variable(
        "HCCL_DETERMINISTIC",
        "true",
        "reductions over ranks add in the same order every time",
        f"{_CANN}, HCCL_DETERMINISTIC",
    ),
    Variable(
        "CLOSE_MATMUL_K_SHIFT",
        "1",
        "matrix products do not shift where they begin along k",
        "MindSpeed, mindspeed/functional/npu_deterministic",
    ),
    Variable(
        "ATB_MATMUL_SHUFFLE_K_ENABLE",
        "0",
        "the same for the matrix products of ATB, which CANN's nnal package has",
        "ATB's environment variables",
    ),
)

_ALSO_DETERMINISTIC = {"HCCL_DETERMINISTIC": ("TRUE", "True", "strict", "STRICT")}


def timeouts(seconds: float) -> tuple[Variable, ...]:
    """HCCL's own time-outs for collectives that may wait `seconds`."""
    low, high = CONNECT_SECONDS
    return (
        Variable(
            "HCCL_CONNECT_TIMEOUT",
            str(min(max(round(seconds), low), high)),
            "seconds in which ranks must find each other: --distributed-timeout-minutes, within "
            f"the {low} to {high} that HCCL takes; HCCL's default is {low}",
            f"{_CANN}, HCCL_CONNECT_TIMEOUT",
        ),
        Variable(
            "HCCL_EXEC_TIMEOUT",
            str(max(round(seconds), 1)),
            "seconds a collective waits for the other ranks: --distributed-timeout-minutes; HCCL's "
            f"default is {DEFAULT_EXEC_SECONDS}",
            f"{_CANN}, HCCL_EXEC_TIMEOUT",
        ),
    )


def wanted(timeout_seconds: float, *, deterministic: bool = False) -> tuple[Variable, ...]:
    """All variables for a run.

    Args:
        timeout_seconds: how long a collective may wait for the other ranks.
        deterministic: the same bits every time.
    """
    chosen = (*RECOMMENDED, *timeouts(timeout_seconds))
    return (*chosen, *DETERMINISTIC) if deterministic else chosen


def apply(variables: tuple[Variable, ...], environ: MutableMapping[str, str]) -> list[Variable]:
    """Sets those that are unset, and returns them.

    Raises:
        UserError: a variable contradicts the deterministic mode that was asked for.
    """
    raise_if(_contradictions(variables, environ))
    chosen = [v for v in variables if not {v.name, *v.unless} & set(environ)]
    environ.update({variable.name: variable.value for variable in chosen})
    return chosen


def _contradictions(variables: tuple[Variable, ...], environ: Mapping[str, str]) -> list[str]:
    faults = []
    for variable in variables:
        found = environ.get(variable.name, variable.value)
        fitting = (variable.value, *_ALSO_DETERMINISTIC.get(variable.name, ()))
        if variable in DETERMINISTIC and found not in fitting:
            faults.append(
                f"{variable.name}={found} contradicts --deterministic, which needs "
                f"{variable.value}: {variable.why}; unset it."
            )
    return faults


def group_timeout_seconds(timeout_seconds: float, environ: Mapping[str, str]) -> float:
    """What torch's process groups wait: longer than HCCL, or its report would never be seen.

    HCCL_EXEC_TIMEOUT=0 means that HCCL waits for ever; torch's time-out is then the only one.
    """
    seconds = [timeout_seconds]
    for name in ("HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT"):
        try:
            seconds.append(float(environ.get(name, "0")))
        except ValueError:
            continue
    return max(seconds) + GROUP_MARGIN_SECONDS


def describe(
    variables: tuple[Variable, ...], chosen: list[Variable], environ: Mapping[str, str]
) -> str:
    """One line for a log: what was set here, and what had been set before."""
    ours = " ".join(f"{variable.name}={variable.value}" for variable in chosen)
    theirs = " ".join(
        f"{v.name}={environ[v.name]}" for v in variables if v not in chosen and v.name in environ
    )
    words = [f"set {ours}" if ours else "", f"found {theirs}" if theirs else ""]
    return f"environment: {'; '.join(word for word in words if word)}"
