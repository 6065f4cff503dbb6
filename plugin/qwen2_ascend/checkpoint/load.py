"""Direct loading: each rank fills its own parameters from any checkpoint, reading just its bytes.

The plan is the splitter's, with the target in memory. Nothing is written to disk, and a rank's
peak is its parameters and what of the source it has mapped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen2_ascend.checkpoint.adapter import Adapter
from qwen2_ascend.checkpoint.copying import Reader, SourceChecks
from qwen2_ascend.checkpoint.formats.stored import NUMPY_DTYPES, StoredTensor
from qwen2_ascend.checkpoint.manifest import compare_with_manifest
from qwen2_ascend.checkpoint.merging import MergingReader
from qwen2_ascend.checkpoint.plan import StoredSlice, Write, extent, make_plan
from qwen2_ascend.checkpoint.readers.base import Source
from qwen2_ascend.checkpoint.rules import Shard, TensorSlice, megatron_pieces
from qwen2_ascend.checkpoint.slices import Run, parts_of
from qwen2_ascend.checkpoint.source import open_source
from qwen2_ascend.checkpoint.verify import check_replicas
from qwen2_ascend.dtypes import DTYPE_NAMES
from qwen2_ascend.errors import UserError
from qwen2_ascend.parallel import ParallelLayout

logger = logging.getLogger(__name__)

Slices = Iterable[tuple[TensorSlice, Run, torch.Tensor]]
"""A tensor of this rank, which run of its elements, and the tensor that takes them."""


def load_checkpoint_weights(
    chunks: Sequence[torch.nn.Module],
    source: Source | str | Path,
    layout: ParallelLayout,
    *,
    padded_vocab_size: int,
    tp_rank: int,
    pp_stage: int,
    adapter: Adapter | None = None,
) -> None:
    """Fills this rank's parameters; vocabulary padding becomes zero.

    Args:
        chunks: the rank's model chunks (one, or one per virtual stage), wrapped or not, on any
            device and of any of the dtypes fp32, bf16, fp16, fp64; values are cast.
        source: an opened source, or a folder of any kind that `open_source` takes.
        layout: how the model in memory is cut (the source may be cut otherwise).
        padded_vocab_size: rows of the model's embedding over all tensor-parallel ranks.
        tp_rank: this rank's tensor-parallel rank.
        pp_stage: this rank's pipeline stage.
        adapter: to merge into the weights.

    Raises:
        UserError: the source does not fit its config, holds a tensor twice and differently, has
            numbers that are too large for the model's dtype, or the model is another one.
    """
    source = source if isinstance(source, Source) else open_source(source)
    layout.check(source.config, padded_vocab_size)
    pieces = megatron_pieces(source.config, layout, padded_vocab_size)
    checks = checks_of(source)
    with MergingReader(adapter) if adapter else Reader() as reader:
        for chunk, module in enumerate(chunks):
            tensors = {name: tensor.detach() for name, tensor in unwrap(module).named_parameters()}
            expected = pieces[Shard(tp_rank, pp_stage, chunk)]
            _check(expected, tensors)
            targets = [in_memory(*item) for item in expected.items()]
            plan = make_plan(source.held, targets, source.config.vocab_size)
            own = {piece.tensor for piece in expected.values()}
            check_replicas(pair for pair in plan.replicas if pair[0].piece.tensor in own)
            for write in plan.writes:
                checks.before(write, reader)
                fill(tensors[write.target.name], write, reader)
            checks.raise_damaged(source.held)
    log_losses(reader)


def log_losses(reader: Reader) -> None:
    """Logs how many of the numbers read became zero in the casts."""
    for remark in reader.losses.remarks():
        logger.warning(f"weights: {remark}")


def checks_of(source: Source, *, is_whole: bool = True) -> SourceChecks:
    """What holds the shards that are read against their manifest, where they have one.

    Args:
        source: opened.
        is_whole: see `compare_with_manifest`.

    Raises:
        DamagedError: their headers are not as the manifest says.
    """
    if source.kind != "mg":
        return SourceChecks({})
    return SourceChecks(compare_with_manifest(source, own_config=False, is_whole=is_whole).parts)


def load_slices(
    slices: Slices,
    sources: Sequence[StoredSlice],
    vocab_size: int,
    *,
    checks: SourceChecks | None = None,
    is_sparse: bool = False,
) -> None:
    """Fills runs of tensors' elements from stored ones, which may be cut otherwise.

    Args:
        slices: what is filled; each tensor is contiguous and has as many elements as its run.
        sources: what is stored.
        vocab_size: rows of the vocabulary that are read; others become zero.
        checks: what the sources are held against.
        is_sparse: whether elements that are stored nowhere become zero too.

    Raises:
        UserError: a tensor is stored twice and differently.
        DamagedError: one is not as it was written.
    """
    targets, tensors = [], []
    for piece, run, tensor in slices:
        for box, part in parts_of(piece.box, run, joins_blocks=True):
            targets.append(in_memory(piece.tensor, TensorSlice(piece.tensor, box, extent(box))))
            within = slice(part.start - run.start, part.stop - run.start)
            tensors.append(tensor.view(-1)[within])
    plan = make_plan(sources, targets, vocab_size, is_sparse=is_sparse)
    own = {held.piece.tensor for held in targets}
    check_replicas(pair for pair in plan.replicas if pair[0].piece.tensor in own)
    checks = checks or SourceChecks({})
    with Reader() as reader:
        for tensor, write in zip(tensors, plan.writes, strict=True):
            checks.before(write, reader)
            fill(tensor, write, reader)
    checks.raise_damaged(sources)


def in_memory(name: str, piece: TensorSlice) -> StoredSlice:
    """A target in memory, which has the dtype that the tensor to be filled has."""
    return StoredSlice(name, piece, StoredTensor(Path("memory"), 0, piece.shape, "fp32"))


def fill(tensor: torch.Tensor, write: Write, reader: Reader) -> None:
    """Reads what the plan says of one tensor; what no source has becomes zero."""
    staged, array = _staging(tensor)
    array[...] = 0
    box = write.target.piece.box
    reader.fill(array.reshape(extent(box)), box, write.copies)
    if staged is not tensor:
        tensor.copy_(staged)


def unwrap(module: Any) -> Any:
    """The GPTModel in a DistributedDataParallel, a Float16Module or both."""
    while hasattr(module, "module"):
        module = module.module
    return module


def _check(expected: Mapping, parameters: Mapping[str, torch.Tensor]) -> None:
    """The model must have the config's parameters, neither more nor less."""
    if different := sorted(expected.keys() ^ parameters.keys()):
        names = ", ".join(different[:8])
        raise UserError(f"the model built is not the checkpoint's: {names} differ.")
    for name in expected:
        if tuple(parameters[name].shape) != expected[name].shape:
            raise UserError(
                f"{name}: the model's shape is {tuple(parameters[name].shape)}, "
                f"the checkpoint's {expected[name].shape}."
            )


def _staging(parameter: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
    """A CPU tensor to fill, the parameter itself where it can be, and its memory as an array."""
    tensor = parameter
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        tensor = torch.empty(parameter.shape, dtype=parameter.dtype)
    raw = tensor.reshape(-1).view(torch.uint8).numpy()
    return tensor, raw.view(NUMPY_DTYPES[DTYPE_NAMES[parameter.dtype]])
