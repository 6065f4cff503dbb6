"""ZeRO's flags, and DeepSpeed's JSON from them and from the file of --deepspeed-config.

The flags say what they have a name for. The file may say the same, or "auto"; what else it says is
handed to DeepSpeed as it is. Keys: https://www.deepspeed.ai/docs/config-json
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.files import json_value
from qwen2_ascend.flags import Flag
from qwen2_ascend.training.settings import TrainingSettings

AUTO = "auto"
OWN = "this launcher's own settings"
ZERO = "zero_optimization"
Dotted = dict[str, Any]
"""Values by the path of keys that leads to them, as in "zero_optimization.stage"."""


@dataclass(frozen=True, kw_only=True)
class ZeroSettings:
    """DeepSpeed ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054)."""

    zero_stage: Literal[1, 2, 3] | None = None
    """What is divided over the ranks: 1 the optimizer's state, 2 gradients too, 3 weights too. By
    default --deepspeed-config's, else 2."""
    offload_optimizer: Flag = False
    """Keep the optimizer's state in the host's memory, and update there."""
    offload_param: Flag = False
    """Keep the weights in the host's memory; needs stage 3."""
    cpu_adam: Literal["auto", "deepspeed", "torch"] = "auto"
    """Who updates with --offload-optimizer: DeepSpeed's operator, which it compiles at its first
    use (a C++ compiler is needed), or torch's slower AdamW. auto: DeepSpeed's, but torch's where
    the device is the cpu anyway."""
    deepspeed_config: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """DeepSpeed's JSON, for what has no flag here. "auto" stands for what the flags say (where
    none does, for DeepSpeed's default); contradictions are refused."""


def deepspeed_config(
    zero: ZeroSettings, settings: TrainingSettings, world_size: int, device: str
) -> dict[str, Any]:
    """What `deepspeed.initialize` takes.

    Args:
        device: cpu, cuda, npu; or "auto", which is not known yet.

    Raises:
        UserError: the file cannot be read, or contradicts the flags.
    """
    path = zero.deepspeed_config
    given = dict(_flat(_read(path))) if path else {}
    faults = list(_own_part_faults(settings, given))
    said, flags = _said(zero, settings, world_size, device), _flags()
    faults += [
        f"{key} {_json(value)} is not a JSON object."
        for key, value in given.items()
        if value != {} and any(name.startswith(f"{key}.") for name in flags)
    ]
    if zero.zero_stage is None and given.get(f"{ZERO}.stage") not in (None, AUTO):
        del said[f"{ZERO}.stage"]
    faults += [
        f"{key} {_json(given[key])} contradicts {flags[key]}, which make it {_json(value)}; leave "
        'it out, or say "auto".'
        for key, value in said.items()
        if key in given and given[key] != AUTO and not _same(given[key], value)
    ]
    kept = {
        key: value
        for key, value in given.items()
        if value not in (AUTO, {}) and not key.startswith("optimizer.")
    }
    merged = {**kept, **said}
    raise_if(f"--deepspeed-config {path}: {fault}" for fault in faults)
    raise_if(_zero_faults(zero, merged))
    return _nested(merged)


def zero_stage(config: Mapping[str, Any]) -> int:
    """1, 2 or 3."""
    return config[ZERO]["stage"]


def offloads_optimizer(config: Mapping[str, Any]) -> bool:
    """Whether the optimizer's state is kept elsewhere than on the device."""
    return config[ZERO].get("offload_optimizer", {}).get("device", "none") != "none"


def _said(zero: ZeroSettings, settings: TrainingSettings, world_size: int, device: str) -> Dotted:
    """What the flags say."""
    batch, precision = settings.batch, settings.precision
    size = settings.global_batch_size(world_size)
    per_pass = max(1, batch.micro_batch_size * world_size)
    said: Dotted = {
        "train_batch_size": size,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": size // per_pass,
        "gradient_clipping": settings.optimizer.clip_grad,
        "bf16.enabled": precision.bf16,
        "fp16.enabled": precision.fp16,
        f"{ZERO}.stage": zero.zero_stage or 2,
        "zero_allow_untested_optimizer": True,
        # the log is ours
        "steps_per_print": 2**31 - 1,
    }
    if precision.fp16:
        said |= {
            "fp16.loss_scale": precision.loss_scale or 0,
            "fp16.initial_scale_power": int(math.log2(precision.initial_loss_scale)),
            "fp16.loss_scale_window": precision.loss_scale_window,
            "fp16.hysteresis": precision.hysteresis,
            "fp16.min_loss_scale": precision.min_loss_scale,
        }
    if zero.offload_optimizer:
        said[f"{ZERO}.offload_optimizer.device"] = "cpu"
    if zero.offload_param:
        said[f"{ZERO}.offload_param.device"] = "cpu"
    if zero.cpu_adam == "torch" or (zero.cpu_adam == AUTO and device == "cpu"):
        said["zero_force_ds_cpu_optimizer"] = False
    return said


def _flags() -> dict[str, str]:
    """Which flags say it, by the key."""
    batch = "--micro-batch-size, --global-batch-size and the number of processes"
    return {
        "zero_allow_untested_optimizer": OWN,
        "steps_per_print": OWN,
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": batch,
        "gradient_clipping": "--clip-grad",
        "bf16.enabled": "--bf16 and --fp16, given or not,",
        "fp16.enabled": "--bf16 and --fp16, given or not,",
        "fp16.loss_scale": "--loss-scale",
        "fp16.initial_scale_power": "--initial-loss-scale",
        "fp16.loss_scale_window": "--loss-scale-window",
        "fp16.hysteresis": "--hysteresis",
        "fp16.min_loss_scale": "--min-loss-scale",
        f"{ZERO}.stage": "--zero-stage",
        f"{ZERO}.offload_optimizer.device": "--offload-optimizer",
        f"{ZERO}.offload_param.device": "--offload-param",
        "zero_force_ds_cpu_optimizer": "--cpu-adam",
    }


def _own_part_faults(settings: TrainingSettings, given: Dotted) -> Iterator[str]:
    """What the file says of the optimizer and the schedule, which are made here."""
    if any(key.split(".")[0] == "scheduler" for key in given):
        yield "scheduler: the learning rate is set by --lr-decay-style and its companions; remove."
    ours = settings.optimizer
    said = {
        "optimizer.type": "AdamW",
        "optimizer.params.lr": ours.lr,
        "optimizer.params.betas": [ours.adam_beta1, ours.adam_beta2],
        "optimizer.params.eps": ours.adam_eps,
        "optimizer.params.weight_decay": ours.weight_decay,
    }
    for key, value in given.items():
        if key.startswith("optimizer.") and value != AUTO and not _same(said.get(key), value):
            yield (
                f"{key} {_json(value)}: the optimizer is AdamW as --lr, --adam-beta1 and their "
                "companions say; remove it."
            )


def _zero_faults(zero: ZeroSettings, merged: Dotted) -> Iterator[str]:
    stage = merged[f"{ZERO}.stage"]
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        yield f"{ZERO}.stage {_json(stage)} is none of 1, 2, 3."
    elif merged.get(f"{ZERO}.offload_param.device", "none") != "none" and stage != 3:
        yield f"--offload-param needs --zero-stage 3, not {stage}: else every rank has all weights."
    if zero.cpu_adam != AUTO and (merged.get(f"{ZERO}.offload_optimizer.device", "none") == "none"):
        yield f"--cpu-adam {zero.cpu_adam} needs --offload-optimizer."


def _read(path: Path) -> dict[str, Any]:
    try:
        read = json_value(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"--deepspeed-config {path}: cannot be read ({error}).") from None
    if not isinstance(read, dict):
        raise UserError(f"--deepspeed-config {path}: is not a JSON object.")
    return read


def _flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _nested(flat: Dotted) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *above, key = path.split(".")
        inner = tree
        for name in above:
            inner = inner.setdefault(name, {})
        inner[key] = value
    return tree


def _same(one: Any, other: Any) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _json(value: Any) -> str:
    return json.dumps(value)
