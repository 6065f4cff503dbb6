"""megatron-core's process groups, and the differences between its releases 0.12 to 0.19.

The differences are of three kinds. Arguments that came or went: `supported_keywords`. What a
release does wrong: a patch, with its entry in the ledger. What it cannot do: a UserError that names
the release that can.
"""

from __future__ import annotations

import functools
import gc
import importlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from qwen2_ascend.errors import UserError
from qwen2_ascend.machine import local_rank
from qwen2_ascend.parallel import ParallelLayout
from qwen2_ascend.runtime import absent_triton
from qwen2_ascend.runtime.ledger import applied_during, apply


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


def check_tensor_parallel(layout: ParallelLayout, num_query_groups: int) -> None:
    """Refuses to cut a query group where the installed release cannot.

    Raises:
        UserError: with the release that can.
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    takes_it = "tensor_model_parallel_size % self.num_query_groups"
    if layout.tp > num_query_groups and takes_it not in inspect.getsource(TransformerConfig):
        raise UserError(
            f"tensor_model_parallel_size={layout.tp} is above num_query_groups="
            f"{num_query_groups}, which the installed megatron-core {_release()} cannot do; "
            f"use {num_query_groups} at most, or install megatron-core 0.16 or later."
        )


def uneven_stages(layout: ParallelLayout) -> dict[str, Any]:
    """The fields of TransformerConfig that tell the installed release of `num_layer_list`.

    Raises:
        UserError: the installed release cannot do it.
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    numbers = layout.num_layer_list
    if numbers is None or layout.pp == 1 or len(set(numbers)) == 1:
        return {}
    if "pipeline_model_parallel_layout" in TransformerConfig.__dataclass_fields__:
        rows = [["decoder"] * n for n in numbers]
        rows[0].insert(0, "embedding")
        rows[-1].append("loss")
        return {"pipeline_model_parallel_layout": rows}
    if len(set(numbers[1:-1])) > 1:
        raise UserError(
            f"num_layer_list={','.join(map(str, numbers))}: the installed megatron-core "
            f"{_release()} can give only the first and the last stage a number of "
            "their own; make the stages between equal, or install megatron-core 0.13 or later."
        )
    first = {"num_layers_in_first_pipeline_stage": numbers[0]}
    # With two stages the last one gets the rest; told both, those releases divide by zero.
    return first | ({"num_layers_in_last_pipeline_stage": numbers[-1]} if len(numbers) > 2 else {})


def check_wsd_decay_style(style: str | None) -> None:
    """Refuses a decay of the WSD schedule that the installed release does not have.

    Raises:
        UserError: with the release that has it.
    """
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    if style == "minus_sqrt" and style not in inspect.getsource(OptimizerParamScheduler):
        raise UserError(
            f"lr_wsd_decay_style={style} is not in the installed megatron-core {_release()}; "
            "use linear, cosine or exponential, or install megatron-core 0.13 or later."
        )


def _release() -> str:
    return ".".join(map(str, megatron_release()))


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


def prepare_import() -> None:
    """Comes before megatron-core is imported, on every device.

    It may be imported without triton, and says nothing in users' logs about packages that nobody
    here needs.
    """
    absent_triton.lend()
    for note in (
        ".*Transformer Engine and Apex are not installed",
        "Apex is not installed",
        # About the default of a field that nobody here sets.
        "full scope is deprecated",
        # 0.15, which tries to compile CUDA code for inference.
        "Failed to create unified memory mempool",
        # 0.19, of a process that is no rank, such as a command's that prepares data.
        "Could not determine rank from torch.distributed",
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
    name = "megatron.core.dist_checkpointing.strategies.filesystem_async"
    module = importlib.import_module(name)
    takes_format = "serialization_format" in inspect.signature(module._write_item).parameters
    if takes_format and "serialization_format" not in inspect.getsource(module):
        apply(
            f"{name}:_write_item",
            _in_torch_format,
            why="megatron-core 0.12 calls a function of torch's that takes one argument more "
            "since torch 2.8",
            how="adds the argument, with the format that torch had before",
            until="megatron-core 0.12 is no longer supported",
        )


def _in_torch_format(original: Callable[..., Any]) -> Callable[..., Any]:
    from torch.distributed.checkpoint.filesystem import SerializationFormat

    return functools.partial(original, serialization_format=SerializationFormat.TORCH_SAVE)


@contextmanager
def each_node_builds_data() -> Iterator[None]:
    """Has the first rank of each node write the sample indices of its node's own disk.

    In the block megatron-core takes a rank's place on its node for its place among all; the others
    of the node wait at the same barriers and read what that one has written.
    """
    place = local_rank()
    with applied_during(
        "torch.distributed:get_rank",
        lambda original: lambda group=None: place if group is None else original(group),
        why="megatron-core lets global rank 0 alone write sample indices, which ranks on nodes "
        "with disks of their own cannot read",
        how="answers the rank's place on its node while datasets are built",
        until="megatron-core has a setting for storage that nodes do not share",
    ):
        yield


def finalize_gradients(
    chunks: list[Any], num_tokens: Any = None, *others: Any, **keywords: Any
) -> None:
    """megatron-core's `finalize_model_grads`: sums gradients over ranks, divides by all tokens.

    0.12 counts the tokens of data-parallel ranks only, not of those that share a sequence.

    Args:
        chunks: in DistributedDataParallel.
        num_tokens: of this rank; None leaves the division out.
        *others: of the installed release, as its schedules give them.
        **keywords: likewise.
    """
    import torch
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads

    if num_tokens is not None and not _counts_tokens_of_sequences(finalize_model_grads):
        group = parallel_state.get_context_parallel_group()
        torch.distributed.all_reduce(num_tokens, group=group)
    finalize_model_grads(chunks, num_tokens, *others, **keywords)


@functools.cache
def sums_only_gradients_that_are_there() -> bool:
    """Whether megatron-core leaves a tied embedding that is frozen out of its stages' sum.

    0.12 asks for its gradient without looking whether it has one.
    """
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    return "grad is None and skip_if_none" in inspect.getsource(module)


@functools.cache
def _counts_tokens_of_sequences(finalize: Callable[..., None]) -> bool:
    return "with_context_parallel=True" in inspect.getsource(finalize)


def prepare_buckets() -> None:
    """Mends the distributed optimizer of tied embeddings over pipeline stages in 0.12."""
    name = "megatron.core.distributed.param_and_grad_buffer"
    source = inspect.getsource(importlib.import_module(name))
    if "if param_start_index % self.data_parallel_world_size" in source:
        apply(
            f"{name}:math",
            _HalfPadding,
            why="a tied embedding has a bucket of its own; megatron-core 0.12 pads the one "
            "before to 128 elements but begins the embedding at the next multiple of 64, so "
            "that it may be in both, which the distributed optimizer refuses by an assertion",
            how="lcm takes 64 for 128: buckets are padded as far as parameters are",
            until="megatron-core 0.12 is no longer supported",
        )


class _HalfPadding:
    """Python's math module, but for the 128 that bucket sizes are multiples of."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def lcm(self, *numbers: int) -> int:
        return self._original.lcm(*(64 if number == 128 else number for number in numbers))


def prepare_distributed_optimizer() -> None:
    """Mends megatron-core 0.12's distributed optimizer where Transformer Engine is missing."""
    name = "megatron.core.optimizer.distrib_optimizer"
    module = importlib.import_module(name)
    if hasattr(module, "quantize_param_shard"):
        apply(
            f"{name}:quantize_param_shard",
            _unless_empty,
            why="megatron-core 0.12 refuses to quantize no fp8 parameters at all without "
            "Transformer Engine",
            how="does nothing when there are no fp8 parameters",
            until="megatron-core 0.12 is no longer supported",
        )


def _unless_empty(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def quantize(model_params: Any, *args: Any, **kwargs: Any) -> Any:
        return original(model_params, *args, **kwargs) if model_params else None

    return quantize
