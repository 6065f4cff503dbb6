"""LoRA adapters to PEFT folders and back, at any layout, through the mapping table.

Saving: each rank writes its own parameters to a file of its own, as shards are; one rank then
merges these as the splitter does. Loading: each rank reads just its bytes. Optimizer moments take
the same way, since they have the parameters' shapes.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from safetensors.torch import save_file

from qwen2_ascend.checkpoint.adapter_rules import adapter_pieces, peft_pieces
from qwen2_ascend.checkpoint.copying import BandBuffers, Reader, write_bands
from qwen2_ascend.checkpoint.formats.peft_adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    encode_config,
    held_tensors,
    read_lora_config,
)
from qwen2_ascend.checkpoint.formats.safetensors import encode_header, read_header
from qwen2_ascend.checkpoint.formats.stored import StoredTensor, TensorSpec
from qwen2_ascend.checkpoint.plan import Copy, Held, make_plan, overlap, volume
from qwen2_ascend.checkpoint.rules import Piece, Shard
from qwen2_ascend.checkpoint.staging import fsync_folder, naming, partial_folder, write_file
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.finetuning.lora import lora_state
from qwen2_ascend.lora_config import LoraConfig
from qwen2_ascend.parallel import ParallelLayout
from qwen2_ascend.training.loop import gathered_parameters

__all__ = [
    "load_adapter",
    "load_adapter_tensors",
    "read_lora_config",
    "save_adapter",
    "save_adapter_tensors",
]

Tensors = Sequence[Mapping[str, torch.Tensor]]
"""For each of this rank's chunks, tensors by adapter parameters' names, of their shapes."""


def save_adapter(
    chunks: Sequence[Any],
    lora: LoraConfig,
    config: Qwen2Config,
    layout: ParallelLayout,
    folder: str | Path,
    *,
    base_model: str | None = None,
    also: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Writes the adapter as a folder that `peft` loads; every rank calls it.

    A new folder appears whole; in one that exists each file is replaced whole, the config last.

    Args:
        chunks: this rank's model chunks, with adapters.
        lora: what `apply_lora` got.
        config: the model's shape.
        layout: how it is cut.
        folder: on a disk that all ranks share.
        base_model: name or folder of the base model, for adapter_config.json.
        also: contents of other files to write, by name.

    Raises:
        OSError: it cannot be written.
    """
    folder = Path(folder)
    partial = partial_folder(folder)
    is_writer = torch.distributed.get_rank() == 0
    if is_writer:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    torch.distributed.barrier()
    with gathered_parameters(chunks):
        save_adapter_tensors(lora_state(chunks), lora, config, layout, partial / WEIGHTS_FILE)
    if is_writer:
        for name, data in also.items():
            write_file(partial / name, data)
        write_file(partial / CONFIG_FILE, encode_config(lora, base_model))
        _publish(partial, folder)
    torch.distributed.barrier()


def load_adapter(
    chunks: Sequence[Any],
    lora: LoraConfig,
    config: Qwen2Config,
    layout: ParallelLayout,
    folder: str | Path,
) -> None:
    """Fills this rank's adapters from a PEFT folder.

    Args:
        chunks: this rank's model chunks, wrapped or not; `apply_lora` added the adapters.
        lora: what it got; but for the dropout it must be what `read_lora_config(folder)` says.
        config: the model's shape.
        layout: how the model is cut; the folder does not depend on it.
        folder: the adapter.

    Raises:
        UserError: it is no adapter, or one of another kind or of another model.
    """
    found = read_lora_config(folder)
    raise_if(
        f"{folder}: its adapter has {name} {_text(getattr(found, name))}, the one asked for "
        f"{_text(getattr(lora, name))}; say the former, or leave the adapter out."
        for name in ("rank", "alpha", "targets", "use_rslora")
        if getattr(found, name) != getattr(lora, name)
    )
    load_adapter_tensors(lora_state(chunks), lora, config, layout, Path(folder) / WEIGHTS_FILE)


def save_adapter_tensors(
    tensors: Tensors, lora: LoraConfig, config: Qwen2Config, layout: ParallelLayout, path: Path
) -> None:
    """Writes one file of an adapter's tensors, whole, under PEFT's names; every rank calls it.

    Args:
        tensors: this rank's, of the adapter parameters' names and shapes; data-parallel ranks
            have the same, and all have one dtype.
        lora: what `apply_lora` got.
        config: the model's shape.
        layout: how it is cut.
        path: the file, in a folder that exists and that all ranks share.

    Raises:
        OSError: it cannot be written.
    """
    pieces = adapter_pieces(config, lora, layout)
    beside = path.parent / f".{path.name}.ranks"
    is_writer = torch.distributed.get_rank() == 0
    if is_writer:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
    torch.distributed.barrier()
    if parallel_state.get_data_parallel_rank() == 0:
        for chunk, own in enumerate(tensors):
            whole = {name: tensor.detach().cpu().contiguous() for name, tensor in own.items()}
            save_file(whole, beside / _rank_file(_shard(chunk)))
    torch.distributed.barrier()
    if is_writer:
        _merge(_held_by_ranks(beside, pieces), peft_pieces(config, lora), path)
        shutil.rmtree(beside)
    torch.distributed.barrier()


def load_adapter_tensors(
    tensors: Tensors, lora: LoraConfig, config: Qwen2Config, layout: ParallelLayout, path: Path
) -> None:
    """Fills tensors from a file that `save_adapter_tensors` wrote, or PEFT; values are cast.

    Args:
        tensors: this rank's, to be filled.
        lora: what `apply_lora` got.
        config: the model's shape.
        layout: how it is cut.
        path: the file.

    Raises:
        UserError: the file's tensors are not those of this adapter and model.
    """
    pieces = adapter_pieces(config, lora, layout)
    sources: dict[str, list[Held]] = defaultdict(list)
    for held in held_tensors(path, config, lora):
        sources[held.piece.tensor].append(held)
    with Reader() as reader:
        for chunk, own in enumerate(tensors):
            expected = pieces[_shard(chunk)]
            if own.keys() != expected.keys():
                raise UserError(f"{path}: the model has other adapters than it; apply_lora first.")
            for name, tensor in own.items():
                _fill(tensor.detach(), expected[name], sources[expected[name].tensor], reader)


def _fill(tensor: torch.Tensor, piece: Piece, sources: Iterable[Held], reader: Reader) -> None:
    copies = [Copy(held, overlap(held.piece.box, piece.box)) for held in sources]
    # fp32 holds every stored dtype exactly; what no source covers belongs to no target
    values = np.zeros([stop - start for start, stop in piece.box], np.float32)
    reader.fill(values, piece.box, [copy for copy in copies if volume(copy.box)])
    tensor.copy_(torch.from_numpy(values).reshape(piece.shape))


def _merge(sources: Sequence[Held], pieces: Mapping[str, Piece], path: Path) -> None:
    """Writes `path` with all of `pieces` beside its place, and renames it."""
    (dtype,) = {held.stored.dtype for held in sources}
    specs = {name: TensorSpec(piece.shape, dtype) for name, piece in pieces.items()}
    header, offsets = encode_header(specs, {"format": "pt"})
    beside = path.with_name(f".{path.name}.new")
    targets = [
        Held(name, piece, StoredTensor(beside, offsets[name], piece.shape, dtype))
        for name, piece in pieces.items()
    ]
    plan = make_plan(sources, targets, vocab_size=0)
    buffers = BandBuffers()
    with Reader() as reader, naming(path), open(beside, "wb") as file:
        file.write(header)
        for write in plan.writes:
            start = write.target.stored.offset

            def put(position: int, band: np.ndarray, start: int = start) -> None:
                file.seek(start + position)
                file.write(band.reshape(-1).view(np.uint8).data)

            write_bands(write, reader, buffers, put)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _held_by_ranks(folder: Path, pieces: Mapping[Shard, Mapping[str, Piece]]) -> list[Held]:
    held = []
    for shard, expected in pieces.items():
        stored = read_header(folder / _rank_file(shard)).tensors
        assert stored.keys() == expected.keys(), f"{shard} has other adapters than the table"
        held += [Held(name, piece, stored[name]) for name, piece in expected.items()]
    return held


def _shard(chunk: int) -> Shard:
    return Shard(
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        chunk,
    )


def _rank_file(shard: Shard) -> str:
    return f"{shard.tp_rank}.{shard.pp_stage}.{shard.chunk}.safetensors"


def _publish(partial: Path, folder: Path) -> None:
    fsync_folder(partial)
    if folder.exists() and any(folder.iterdir()):
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            os.replace(partial / name, folder / name)
        partial.rmdir()
        fsync_folder(folder)
    else:
        os.rename(partial, folder)
    fsync_folder(folder.parent)


def _text(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)
