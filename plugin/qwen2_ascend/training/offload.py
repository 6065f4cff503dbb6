"""--optimizer-cpu-offload: part of the optimizer's state waits, and is updated, on the host.

megatron-core's HybridDeviceOptimizer keeps the fp32 weights and moments of the first parameters on
the host, until they make up `--optimizer-offload-fraction` of all. At each update it copies their
gradients to the host and the updated weights back. It takes the path of megatron-core's
precision-aware optimizer, so the distributed optimizer makes no fp32 weights of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig

from qwen2_ascend.errors import UserError
from qwen2_ascend.training.optimizer_settings import OptimizerSettings


def config_keywords(settings: OptimizerSettings, device: str) -> dict[str, Any]:
    """Arguments for megatron-core's OptimizerConfig; a CPU's optimizer is on the host anyway.

    Raises:
        UserError: the installed megatron-core cannot do it.
    """
    if not settings.optimizer_cpu_offload or device == "cpu":
        return {}
    if not hasattr(OptimizerConfig(), "use_precision_aware_optimizer_no_fp8_or_ds_fp8"):
        raise UserError(
            "--optimizer-cpu-offload: the installed megatron-core's optimizer cannot leave the "
            "fp32 weights to the host's; install megatron-core 0.16, or leave it out."
        )
    return {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": settings.optimizer_offload_fraction,
    }


def leave_weights_to_hybrid(config: Any) -> None:
    """Sets the precision-aware optimizer in a config that offloads.

    It is not said as a keyword, because OptimizerConfig then asks for Transformer Engine's version,
    which the hybrid optimizer does not need.
    """
    if getattr(config, "optimizer_cpu_offload", False):
        config.use_precision_aware_optimizer = True
        config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True


def is_hybrid(inner: Any) -> bool:
    """Whether it is megatron-core's HybridDeviceOptimizer."""
    return hasattr(inner, "sub_optimizers")


def sub_optimizers(inner: Any) -> list[torch.optim.Optimizer]:
    """The optimizers that update: of a hybrid one for the host and one for the device."""
    return list(inner.sub_optimizers) if is_hybrid(inner) else [inner]


def updated(inner: Any, parameter: torch.Tensor) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    """The tensor that is updated for a parameter of `inner`, and the optimizer that does it."""
    if not is_hybrid(inner):
        return parameter, inner
    main = inner.param_to_inner_param[parameter]
    on_host = parameter in inner.gpu_params_map_cpu_copy
    (own,) = (
        optimizer
        for optimizer in inner.sub_optimizers
        if (optimizer is not inner.gpu_optimizer) == on_host
    )
    return main, own


def plain_group(inner: Any, group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group without what only a hybrid optimizer has in it, such as classes."""
    if not is_hybrid(inner):
        return dict(group)
    own = set(inner.defaults) - {"lr", "weight_decay", "betas", "eps", "fused"}
    return {key: value for key, value in group.items() if key not in own}
