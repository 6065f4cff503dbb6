"""The optimizer's state in the form that megatron-core's own optimizers save and load.

`checkpoint.formats.megatron_optimizer` shows the form. Here it is laid out: plain values, a
TensorSpec wherever a tensor goes, and where among them each tensor of `optimizer.state_slices` is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from qwen2_ascend.checkpoint.formats.megatron import PT_FILE
from qwen2_ascend.checkpoint.formats.megatron_optimizer import (
    FLAT_FILE,
    FLAT_KINDS,
    FULLY_RESHARDABLE,
    KEY,
    MAIN,
    MOMENTS,
)
from qwen2_ascend.checkpoint.formats.pickles import DType
from qwen2_ascend.checkpoint.formats.stored import TensorSpec
from qwen2_ascend.checkpoint.formats.torch_pt import KeyPath
from qwen2_ascend.training import offload
from qwen2_ascend.training import optimizer as optimizers

_SCALE = ("grad_scaler", "scale")


class InFile(NamedTuple):
    """Where a tensor begins: in which tensor of a file, and at which element of it."""

    file: str
    path: KeyPath
    start: int = 0


class Laid(NamedTuple):
    """The optimizer's state, laid out for the files of a tensor/pipeline rank."""

    state: dict[Any, Any]
    """What the file of the weights holds below `KEY`."""
    places: dict[tuple[torch.nn.Parameter, str], InFile]
    """The place of each parameter and kind."""
    flat: dict[Any, Any] | None = None
    """What FLAT_FILE holds, if there is one."""


def small_state(optimizer: Any) -> dict[str, Any]:
    """What the state has besides the tensors of parameters, as torch_dist keeps it."""
    (part,) = optimizers.parts(optimizer)
    inner: dict[str, Any] = {"param_groups": _groups(optimizer, part)}
    if optimizers.is_distributed(optimizer):
        return {
            "optimizer": inner,
            **_scaler(part),
            "param_state_sharding_type": FULLY_RESHARDABLE,
        }
    inner = {"state": {"common_step": float(optimizers.num_updates(optimizer))}, **inner}
    return {"optimizer": inner, **_scaler(part)} if _has_mains(part) else inner


def content_metadata(optimizer: Any) -> dict[str, Any]:
    """What megatron-core's readers of torch_dist go by to find the optimizer's tensors."""
    metadata: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    if optimizers.is_distributed(optimizer):
        metadata["distrib_optim_sharding_type"] = FULLY_RESHARDABLE
        metadata["distrib_optim_fully_reshardable_mem_efficient"] = False
    return metadata


def scale_tensors(optimizer: Any) -> dict[KeyPath, torch.Tensor]:
    """The dynamic loss scale, by its place in the state; empty without one."""
    (part,) = optimizers.parts(optimizer)
    scaler: Any = getattr(part, "grad_scaler", None)
    return {_SCALE: scaler._scale} if hasattr(scaler, "_growth_tracker") else {}


def laid_state(optimizer: Any) -> Laid:
    """The state of an optimizer, as it is in a rank's files."""
    is_distributed = optimizers.is_distributed(optimizer)
    return _distributed_state(optimizer) if is_distributed else _plain_state(optimizer)


def _plain_state(optimizer: Any) -> Laid:
    (part,) = optimizers.parts(optimizer)
    groups, numbers = _groups(optimizer, part), _numbers(part)
    for group, own in zip(groups, numbers, strict=True):
        group["params"] = list(own.values())
    step = float(optimizers.num_updates(optimizer))
    inner = {"state": {}, "param_groups": groups}
    is_below = _has_mains(part)
    above: KeyPath = (KEY, "optimizer") if is_below else (KEY,)
    places: dict[tuple[torch.nn.Parameter, str], InFile] = {}
    for parameter, number in ((p, n) for own in numbers for p, n in own.items()):
        spec = TensorSpec(tuple(parameter.shape), "fp32")
        inner["state"][number] = {"step": step, **dict.fromkeys(MOMENTS, spec)}
        for kind in MOMENTS:
            places[parameter, kind] = InFile(PT_FILE, (*above, "state", number, kind))
    if not is_below:
        return Laid(inner, places)
    mains = [[TensorSpec(tuple(p.shape), "fp32") for p in own] for own in numbers]
    for at, own in enumerate(numbers):
        for index, parameter in enumerate(own):
            places[parameter, MAIN] = InFile(PT_FILE, (KEY, "fp32_from_fp16_params", at, index))
    state = {"optimizer": inner, **_scaler(part), "fp32_from_fp16_params": mains}
    return Laid(state, places)


def _distributed_state(optimizer: Any) -> Laid:
    (part,) = optimizers.parts(optimizer)
    state = {"optimizer": {"param_groups": _groups(optimizer, part)}, **_scaler(part)}
    flat: dict[Any, Any] = {"buckets_coalesced": True}
    places: dict[tuple[torch.nn.Parameter, str], InFile] = {}
    for index, buffer in enumerate(part.buffers):
        both = (buffer.param_dtype, buffer.grad_dtype)
        dtypes = tuple(DType(str(dtype).removeprefix("torch.")) for dtype in both)
        sizes = [bucket.numel_unpadded for bucket in buffer.buckets]
        spec = TensorSpec((sum(sizes),), "fp32")
        flat[index] = {
            dtypes: {**dict.fromkeys(FLAT_KINDS.values(), spec), "numel_unpadded": sum(sizes)}
        }
        for parameter, (start, _, bucket) in buffer.param_index_map.items():
            start += sum(sizes[:bucket]) - buffer.buckets[bucket].offset
            for kind, key in FLAT_KINDS.items():
                places[parameter, kind] = InFile(FLAT_FILE, (index, dtypes, key), start)
    return Laid(state, places, flat)


def _groups(optimizer: Any, part: Any) -> list[dict[str, Any]]:
    """torch's parameter groups without the parameters, with the number of updates in each.

    How this project runs Adam is no matter of the checkpoint's: other tools choose by themselves.
    """
    left_out = {"fused": None, "foreach": None, "step": optimizers.num_updates(optimizer)}
    return [
        {key: value for key, value in group.items() if key != "params"} | left_out
        for group in (offload.plain_group(part.optimizer, g) for g in part.optimizer.param_groups)
    ]


def _numbers(part: Any) -> list[dict[torch.nn.Parameter, int]]:
    """The model's parameters of each parameter group, with the number that torch gives each."""
    if _has_mains(part):
        groups = part.float16_groups
    else:
        groups = [group["params"] for group in part.optimizer.param_groups]
    numbers, count = [], 0
    for group in groups:
        numbers.append({parameter: count + n for n, parameter in enumerate(group)})
        count += len(group)
    return numbers


def _has_mains(part: Any) -> bool:
    """Whether it keeps fp32 copies of 16-bit weights."""
    return hasattr(part, "fp32_from_float16_groups")


def _scaler(part: Any) -> Mapping[str, Any]:
    """The loss scale's state, where it is scaled."""
    scaler = getattr(part, "grad_scaler", None)
    if not scaler:
        return {}
    state = dict(scaler.state_dict())
    return {
        "grad_scaler": state | ({"scale": TensorSpec((1,), "fp32")} if "scale" in state else {})
    }
