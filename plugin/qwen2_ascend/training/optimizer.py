"""AdamW over a pipeline stage's model chunks, and its state in a form that fits any layout.

megatron-core keeps the optimizer's state in three shapes: beside fp32 weights, beside fp32 copies
of 16-bit weights, or as slices of those over the data-parallel ranks. `state_slices` and
`new_state` give each in one canonical form: for every parameter that this rank updates, which run
of its elements, and of that run `exp_avg`, `exp_avg_sq` and, for 16-bit weights, `fp32_param`. A
checkpoint holds them in fp32 and nothing else, so it can be resumed at another layout, with or
without the distributed optimizer, and by fp32 and bf16 runs alike; and no rank needs more than its
own slices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from qwen2_ascend.checkpoint.formats.megatron_optimizer import MAIN, MOMENTS
from qwen2_ascend.dtypes import TORCH_DTYPES
from qwen2_ascend.runtime import supported_keywords
from qwen2_ascend.runtime.megatron_compat import prepare_distributed_optimizer
from qwen2_ascend.training import offload
from qwen2_ascend.training.halves import Pair, SplitMains, split_mains
from qwen2_ascend.training.o2 import HalfMomentsAdamW
from qwen2_ascend.training.settings import TrainingSettings


class Slice(NamedTuple):
    """What this rank updates of one parameter: elements start..stop of it, flattened."""

    main: torch.Tensor
    """The fp32 weights that are updated, of any shape with stop - start elements."""
    start: int
    stop: int
    optimizer: torch.optim.Optimizer


class StateSlice(NamedTuple):
    """The optimizer's tensors of elements start..stop of one parameter, flattened."""

    start: int
    stop: int
    tensors: dict[str, torch.Tensor]
    """MOMENTS and MAIN by kind, in place wherever the optimizer has them. All are fp32, but for the
    moments of --o2-optimizer, which are bf16. The distributed optimizer has MAIN of fp32 weights
    too, the weights themselves."""


def build_optimizer(chunks: Sequence[Any], settings: TrainingSettings) -> MegatronOptimizer:
    """megatron-core's mixed-precision AdamW; norms and biases get no weight decay.

    Backward is made to begin with its loss scale.

    Args:
        chunks: model chunks in megatron-core's DistributedDataParallel.
        settings: what `settings.validate` has checked.
    """
    optimizer, precision = settings.optimizer, settings.precision
    device = next(chunks[0].parameters()).device.type
    keywords = dict(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=precision.bf16,
        fp16=precision.fp16,
        params_dtype=TORCH_DTYPES[settings.precision_name()],
        loss_scale=precision.loss_scale,
        initial_loss_scale=precision.initial_loss_scale,
        min_loss_scale=precision.min_loss_scale,
        loss_scale_window=precision.loss_scale_window,
        hysteresis=precision.hysteresis,
        use_distributed_optimizer=settings.parallel.use_distributed_optimizer,
        overlap_param_gather=settings.parallel.overlap_param_gather,
        **offload.config_keywords(optimizer, device),
    )
    prepare_distributed_optimizer()
    config = OptimizerConfig(**supported_keywords(OptimizerConfig, **keywords))
    offload.leave_weights_to_hybrid(config)
    built = get_megatron_optimizer(config, list(chunks))
    chunks[0].config.grad_scale_func = built.scale_loss
    if precision.o2_optimizer:
        for part in parts(built):
            part.optimizer = HalfMomentsAdamW(part.optimizer.param_groups)
    _fuse(built, settings.fusion.has_fused_adamw(device))
    if precision.reuse_fp32_param:
        built.split_mains = SplitMains(_pairs(built))  # pyright: ignore[reportAttributeAccessIssue]
    return built


def _pairs(optimizer: Any) -> Iterator[Pair]:
    """The fp32 weights that this rank updates and the bf16 ones that they are of."""
    for parameter, own in _slices(optimizer):
        if own.main.dtype != parameter.dtype:
            yield Pair(own.main, parameter.detach().view(-1)[own.start : own.stop])


def settle(optimizer: Any) -> None:
    """Gives memory back that the state needs only while it is loaded or updated."""
    for part in parts(optimizer):
        if isinstance(part.optimizer, HalfMomentsAdamW):
            part.optimizer.narrow()
    if mains := split_mains(optimizer):
        mains.split()


def _fuse(optimizer: Any, has_fused: bool) -> None:
    """Lets one kernel update a whole tensor: `aclnnApplyAdamWV2` on an NPU, torch's own on a CPU.

    megatron-core builds torch's AdamW without saying how it is to run; the groups are where `step`
    looks. torch_npu's own `NpuFusedAdamW` keeps copies of its own of what it updates, which the
    slices of the distributed optimizer and the canonical state would know nothing of. A hybrid
    optimizer is fused without being told.
    """
    for part in parts(optimizer):
        for group in part.optimizer.param_groups:
            if has_fused and _counts_per_parameter(part.optimizer):
                group.update(fused=True, foreach=False)
            elif not has_fused and offload.is_hybrid(part.optimizer):
                group.update(fused=False)


@torch.no_grad()
def clip_and_step(optimizer: MegatronOptimizer, grad_norm: float) -> bool:
    """Updates the weights from gradients that `prepare_grads` has made ready.

    megatron-core's own `step` computes the norm and updates in one call; between the two is where
    a norm that is not finite has to be seen.

    Args:
        optimizer: built by `build_optimizer`.
        grad_norm: norm of the whole gradient, from `optimizer.get_grad_norm()`.

    Returns:
        Whether the weights were updated.
    """
    for part in parts(optimizer):
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            _clip(part, parameters, grad_norm)
    mains = split_mains(optimizer)
    if mains is not None:
        mains.join()
    updated = bool(optimizer.step_with_ready_grads())
    if mains is not None:
        mains.split()
    # fp32 copies of 16-bit gradients would stay until the next step
    optimizer.zero_grad()
    return updated


def _clip(part: Any, parameters: list[torch.Tensor], grad_norm: float) -> None:
    """Brings the norm of the gradient down to the largest that is allowed."""
    is_hybrid = offload.is_hybrid(part.optimizer)
    if _is_fused(part.optimizer) and parameters[0].device.type == "cpu":
        # torch's kernel divides as it reads; megatron-core's way is two passes over all gradients
        excess = (grad_norm + 1e-6) / part.config.clip_grad
        part.optimizer.grad_scale = torch.tensor(excess) if excess > 1 else None
        return
    clip_grad_by_total_norm_fp32(
        parameters,
        max_norm=part.config.clip_grad,
        total_norm=grad_norm,
        **supported_keywords(clip_grad_by_total_norm_fp32, use_decoupled_grad=is_hybrid),
    )


def loss_scale(optimizer: MegatronOptimizer) -> float:
    """What the loss is multiplied by before backward."""
    scaler = _scaler(optimizer)
    return 1.0 if scaler is None else _on_host(scaler.scale)


def can_lower_loss_scale(optimizer: MegatronOptimizer) -> bool:
    """Whether an overflow is what a dynamic loss scale expects, and has an answer to."""
    scaler = _scaler(optimizer)
    return hasattr(scaler, "min_scale") and _on_host(scaler.scale) > _on_host(scaler.min_scale)


def _scaler(optimizer: Any) -> Any:
    """What scales the loss; None without one."""
    scalers = [getattr(part, "grad_scaler", None) for part in parts(optimizer)]
    found = [scaler for scaler in scalers if scaler is not None]
    assert len(found) <= 1, "one loss has one scale"
    return found[0] if found else None


def _on_host(scale: torch.Tensor) -> float:
    """The value of a tensor that megatron-core replaces rather than changes.

    Fetched from the device once: it would wait there for the whole update, in every step.
    """
    if not hasattr(scale, "value_on_host"):
        scale.value_on_host = float(scale)  # pyright: ignore[reportAttributeAccessIssue]
    return scale.value_on_host  # pyright: ignore[reportAttributeAccessIssue]


def num_updates(optimizer: MegatronOptimizer) -> int:
    """Updates that Adam has made, which its bias correction goes by."""
    inners = [
        inner for part in parts(optimizer) for inner in offload.sub_optimizers(part.optimizer)
    ]
    for inner in inners:
        steps = [state["step"] for state in inner.state.values() if "step" in state]
        steps += [group["step"] for group in inner.param_groups if "step" in group]
        if steps:
            return int(steps[0])
    return 0


def kinds_of(parameter: torch.nn.Parameter) -> tuple[str, ...]:
    """The optimizer's tensors of a parameter; fp32 weights are their own main weights."""
    return MOMENTS if parameter.dtype == torch.float32 else (*MOMENTS, MAIN)


def is_distributed(optimizer: MegatronOptimizer) -> bool:
    """Whether data-parallel ranks have different slices."""
    return any(hasattr(part, "model_param_group_index_map") for part in parts(optimizer))


@torch.no_grad()
def state_slices(optimizer: MegatronOptimizer) -> dict[torch.nn.Parameter, StateSlice]:
    """What this rank keeps of every parameter that it updates any of; nothing is copied.

    Before the first update the moments are zeros.
    """
    states, mains = {}, split_mains(optimizer)
    for parameter, own in _slices(optimizer):
        state = own.optimizer.state.get(own.main, {})
        tensors = {
            kind: state[kind] if kind in state else torch.zeros_like(own.main, dtype=torch.float32)
            for kind in MOMENTS
        }
        if MAIN in kinds_of(parameter) or is_distributed(optimizer):
            tensors[MAIN] = own.main.detach() if mains is None else mains.whole(own.main)
        states[parameter] = StateSlice(own.start, own.stop, tensors)
    return states


@torch.no_grad()
def new_state(
    optimizer: MegatronOptimizer, num_updates: int
) -> dict[torch.nn.Parameter, StateSlice]:
    """The state after `num_updates` updates, with zero moments, in place and to be filled.

    The weights must have been loaded before: the main weights are taken from them.

    Args:
        optimizer: built by `build_optimizer`, as yet without state.
        num_updates: what `num_updates` said when the moments were saved.
    """
    if mains := split_mains(optimizer):
        mains.join()
    optimizer.reload_model_params()
    for _, own in _slices(optimizer):
        state = {kind: torch.zeros_like(own.main, dtype=torch.float32) for kind in MOMENTS}
        if _counts_per_parameter(own.optimizer):
            # a tensor of its own: Adam adds to it in place
            device = own.main.device if _is_fused(own.optimizer) else None
            state["step"] = torch.tensor(float(num_updates), dtype=torch.float32, device=device)
        own.optimizer.state[own.main] = state
    for part in parts(optimizer):
        if not all(map(_counts_per_parameter, offload.sub_optimizers(part.optimizer))):
            for group in part.optimizer.param_groups:
                group["step"] = num_updates
    return state_slices(optimizer)


def scaler_state(optimizer: MegatronOptimizer) -> dict[str, float]:
    """The dynamic loss scale, in plain numbers; empty without one."""
    scaler = _scaler(optimizer)
    if not hasattr(scaler, "_growth_tracker"):
        return {}
    return {
        "scale": float(scaler.scale),
        "growth_tracker": scaler._growth_tracker,
        "hysteresis_tracker": scaler._hysteresis_tracker,
    }


def load_scaler_state(optimizer: MegatronOptimizer, state: Mapping[str, float]) -> None:
    """Puts `scaler_state` back, if this run scales its loss dynamically too."""
    scaler = _scaler(optimizer)
    if state and hasattr(scaler, "_growth_tracker"):
        scaler._scale = torch.full_like(scaler._scale, state["scale"])
        scaler._growth_tracker = int(state["growth_tracker"])
        scaler._hysteresis_tracker = int(state["hysteresis_tracker"])


def parts(optimizer: Any) -> list[Any]:
    """The optimizers of which megatron-core's is made; for Qwen2 there is one."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in chained if not getattr(part, "is_stub_optimizer", False)]


def _counts_per_parameter(inner: torch.optim.Optimizer) -> bool:
    """torch's Adam counts updates per parameter, the fused ones per parameter group."""
    return isinstance(inner, torch.optim.Adam | torch.optim.AdamW)


def _is_fused(inner: torch.optim.Optimizer) -> bool:
    """A fused kernel reads the number of updates on the device, the others on the host."""
    return any(group.get("fused") for group in inner.param_groups)


def _slices(optimizer: Any) -> Iterator[tuple[torch.nn.Parameter, Slice]]:
    """Every parameter of which this rank updates anything, with what it updates."""
    for part in parts(optimizer):
        if hasattr(part, "model_param_group_index_map"):
            yield from _distributed_slices(part)
            continue
        pairs = [(p, p) for group in part.optimizer.param_groups for p in group["params"]]
        if hasattr(part, "fp32_from_float16_groups"):
            pairs = []
            for models, mains in zip(
                part.float16_groups, part.fp32_from_float16_groups, strict=True
            ):
                pairs += zip(models, mains, strict=True)
            pairs += [(p, p) for group in part.fp32_from_fp32_groups for p in group]
        for parameter, main in pairs:
            yield parameter, Slice(main, 0, parameter.numel(), part.optimizer)


def _distributed_slices(part: Any) -> Iterator[tuple[torch.nn.Parameter, Slice]]:
    for parameter, (group, place) in part.model_param_group_index_map.items():
        held = part._get_model_param_range_map(parameter)["param"]
        shard = part.optimizer.param_groups[group]["params"][place]
        main, inner = offload.updated(part.optimizer, shard)
        yield parameter, Slice(main, held.start, held.end, inner)


def is_finite(*values: float) -> bool:
    """Whether none of `values` is infinite or not a number."""
    return all(math.isfinite(value) for value in values)
