"""Weights into transformers' model and out of it, one tensor at a time.

The plan is the splitter's: in comes any checkpoint that it reads, out goes the Hugging Face folder
that it writes. With ZeRO-3 a rank has parts of the weights only; a tensor is whole, on all ranks,
just while it is read or written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from qwen2_ascend.checkpoint.copying import Reader
from qwen2_ascend.checkpoint.load import fill, in_memory, log_losses
from qwen2_ascend.checkpoint.plan import make_plan
from qwen2_ascend.checkpoint.readers.base import Source
from qwen2_ascend.checkpoint.rules import hugging_face_pieces
from qwen2_ascend.checkpoint.target import Target, hugging_face_target
from qwen2_ascend.checkpoint.verify import check_replicas
from qwen2_ascend.checkpoint.writing import pwrite
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.dtypes import TORCH_DTYPES
from qwen2_ascend.files import write_file

MAX_SHARD_BYTES = 5 * 10**9

Whole = Callable[..., AbstractContextManager]
"""`whole([parameter])` makes it whole for the length of a block; with `modifier_rank=0` what that
rank made of it is kept. DeepSpeed's `GatheredParameters` at ZeRO-3, else `as_it_is`."""


def as_it_is(*_: Any, **__: Any) -> AbstractContextManager:
    """The `Whole` of parameters that are whole anyway."""
    return nullcontext()


def load_weights(
    model: torch.nn.Module, source: Source, whole: Whole = as_it_is, *, reads: bool = True
) -> None:
    """Fills the model; every rank calls it.

    Args:
        model: transformers' Qwen2ForCausalLM.
        source: any checkpoint of the same config.
        whole: see `Whole`.
        reads: whether this rank's values count.

    Raises:
        UserError: the source holds a tensor twice and differently, or numbers that are too large
            for the model's dtype.
    """
    parameters = _checked_parameters(model, source.config)
    targets = [in_memory(*item) for item in hugging_face_pieces(source.config).items()]
    plan = make_plan(source.held, targets, source.config.vocab_size)
    check_replicas(plan.replicas)
    with Reader() as reader:
        for write in plan.writes:
            parameter = parameters[write.target.name]
            with whole([parameter], modifier_rank=0):
                if reads:
                    fill(parameter.detach(), write, reader)
    log_losses(reader)


def save_hugging_face(
    model: torch.nn.Module,
    config: Qwen2Config,
    folder: Path,
    whole: Whole,
    *,
    dtype: str,
    side_files: Mapping[Path, bytes],
    writes: bool,
) -> None:
    """Writes the model into `folder` as a Hugging Face model; every rank calls it.

    Args:
        model: transformers' Qwen2ForCausalLM.
        config: its config.
        folder: is there.
        whole: see `Whole`.
        dtype: bf16, fp16 or fp32.
        side_files: config.json and the tokenizer's files.
        writes: whether this rank writes.

    Raises:
        OSError: it cannot be written.
    """
    parameters = _checked_parameters(model, config)
    target = hugging_face_target(config, dtype, MAX_SHARD_BYTES, ())
    files = _begin_files(target, folder) if writes else {}
    try:
        for held in target.held:
            parameter = parameters[held.name]
            with whole([parameter]):
                if writes:
                    data = _bytes_of(parameter, dtype)
                    assert len(data) == held.stored.num_bytes
                    pwrite(files[held.stored.path], data, held.stored.offset)
        for file in files.values():
            os.fsync(file)
    finally:
        for file in files.values():
            os.close(file)
    if writes:
        for path, small in {**side_files, **target.small_files}.items():
            write_file(folder / path, small)


def shape_of(parameter: torch.nn.Parameter) -> torch.Size:
    """The whole parameter's, also where ZeRO-3 has left a part of it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _checked_parameters(model: Any, config: Qwen2Config) -> dict[str, torch.nn.Parameter]:
    """The parameters by name, which are exactly those of the mapping table."""
    parameters = dict(model.named_parameters())
    expected = {name: piece.shape for name, piece in hugging_face_pieces(config).items()}
    assert {name: tuple(shape_of(p)) for name, p in parameters.items()} == expected
    return parameters


def _begin_files(target: Target, folder: Path) -> dict[Path, int]:
    """The files at their full length, with all that is not tensors."""
    files = {}
    for path, file in target.files.items():
        files[path] = os.open(folder / path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        os.truncate(files[path], file.total_bytes)
        for start, data in file.segments:
            pwrite(files[path], memoryview(data), start)
    return files


def _bytes_of(parameter: torch.Tensor, dtype: str) -> memoryview:
    tensor = parameter.detach().to("cpu", TORCH_DTYPES[dtype]).contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().data
