"""megatron-core's process groups, and the differences between its releases 0.12 and 0.16."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from qwen2_ascend.errors import UserError
from qwen2_ascend.parallel import ParallelLayout


def supported_keywords(function: Callable[..., Any], **keywords: Any) -> dict[str, Any]:
    """Those of `keywords` that the installed release's `function` takes.

    For arguments only that came or went between the releases this project runs with.
    """
    taken = inspect.signature(function).parameters
    return {name: value for name, value in keywords.items() if name in taken}


def megatron_release() -> tuple[int, int]:
    """The installed megatron-core's release: (0, 16)."""
    import megatron.core

    major, minor = megatron.core.__version__.split(".")[:2]
    return int(major), int(minor)


def initialize_model_parallel(layout: ParallelLayout, num_layers: int) -> None:
    """Builds megatron-core's process groups for `layout`; what is left over is data parallel.

    Args:
        layout: sizes of the cut; checked against the model by `ParallelLayout.check`.
        num_layers: of the whole model, which with `layout` gives the virtual pipeline size.

    Raises:
        UserError: tensor times pipeline parallel size does not divide the number of processes.
    """
    from megatron.core import parallel_state

    from qwen2_ascend.runtime.startup import current

    runtime = current()
    model_size = layout.tp * layout.pp
    if runtime.world_size % model_size:
        raise UserError(
            f"{runtime.world_size} process(es) cannot hold tensor_model_parallel_size={layout.tp} "
            f"times pipeline_model_parallel_size={layout.pp} = {model_size}; start a multiple of "
            f"{model_size}."
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=virtual_pipeline_size(layout, num_layers),
        distributed_timeout_minutes=max(1, math.ceil(runtime.timeout_seconds / 60)),
    )


def destroy_model_parallel() -> None:
    """Takes the process groups down, so that another layout can be initialized."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
        # 0.12 forgets the groups but not their ranks, and fails on the next layout.
        parallel_state._EMBEDDING_GLOBAL_RANKS = None
        parallel_state._POSITION_EMBEDDING_GLOBAL_RANKS = None
        _close_groups()


def _close_groups() -> None:
    """Ends every process group but the world's.

    megatron-core only forgets them; with gloo each keeps its threads, fifty for a layout.
    """
    import gc

    import torch

    world = torch.distributed.group.WORLD
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        if group is not world:
            torch.distributed.destroy_process_group(group)
    gc.collect()


def virtual_pipeline_size(layout: ParallelLayout, num_layers: int) -> int | None:
    """Chunks per stage as megatron-core wants it: None, not 1, without an interleaved pipeline."""
    size = layout.virtual_pipeline_size(num_layers)
    return None if size == 1 else size


@contextmanager
def virtual_stage(index: int | None) -> Iterator[int | None]:
    """Builds chunk `index` of an interleaved pipeline; None is for a plain one.

    Newer releases are told by GPTModel's `vp_stage`, older ones by this global.
    """
    from megatron.core import parallel_state

    tell = getattr(parallel_state, "set_virtual_pipeline_model_parallel_rank", None)
    if index is None or tell is None:
        yield index
        return
    tell(index)
    try:
        yield index
    finally:
        tell(0)


def silence_known_notes() -> None:
    """Keeps out of users' logs what megatron-core says about packages nobody here needs."""
    for note in (
        ".*Transformer Engine and Apex are not installed",
        "Apex is not installed",
        # About the default of a field that nobody here sets.
        "full scope is deprecated",
    ):
        warnings.filterwarnings("ignore", message=note, category=UserWarning)
    # An MLP of another class than megatron-core's own takes the tensor-parallel group by itself.
    logging.getLogger("megatron.core.transformer.transformer_layer").addFilter(_is_no_mlp_note)


def _is_no_mlp_note(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Unknown MLP type")


def model_parallel_seed(seed: int) -> int:
    """Seeds megatron-core's RNG trackers and returns this pipeline stage's own seed."""
    from megatron.core import parallel_state, tensor_parallel

    if not parallel_state.model_parallel_is_initialized():
        return seed
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return seed


def prepare_torch_dist() -> None:
    """Mends megatron-core's saving of torch_dist checkpoints where this installation needs it."""
    from qwen2_ascend.runtime.ledger import Patch, apply

    name = "megatron.core.dist_checkpointing.strategies.filesystem_async"
    module = importlib.import_module(name)
    takes_format = "serialization_format" in inspect.signature(module._write_item).parameters
    if takes_format and "serialization_format" not in inspect.getsource(module):
        apply(
            Patch(
                target=f"{name}:_write_item",
                why="megatron-core 0.12 calls a function of torch's that takes one argument more "
                "since torch 2.8",
                how="adds the argument, with the format that torch had before",
                until="megatron-core 0.12 is no longer supported",
            ),
            _in_torch_format,
        )


def _in_torch_format(original: Callable[..., Any]) -> Callable[..., Any]:
    from torch.distributed.checkpoint.filesystem import SerializationFormat

    return functools.partial(original, serialization_format=SerializationFormat.TORCH_SAVE)


def prepare_distributed_optimizer() -> None:
    """Mends megatron-core 0.12's distributed optimizer where Transformer Engine is missing."""
    from qwen2_ascend.runtime.ledger import Patch, apply

    name = "megatron.core.optimizer.distrib_optimizer"
    module = importlib.import_module(name)
    if hasattr(module, "quantize_param_shard"):
        apply(
            Patch(
                target=f"{name}:quantize_param_shard",
                why="megatron-core 0.12 refuses to quantize no fp8 parameters at all without "
                "Transformer Engine",
                how="does nothing when there are no fp8 parameters",
                until="megatron-core 0.12 is no longer supported",
            ),
            _unless_empty,
        )


def _unless_empty(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def quantize(model_params: Any, *args: Any, **kwargs: Any) -> Any:
        return original(model_params, *args, **kwargs) if model_params else None

    return quantize
