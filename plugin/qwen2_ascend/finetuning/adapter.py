"""LoRA adapters to PEFT folders and back, at any layout, through the mapping table.

Saving: each rank writes its own elements to a file of its own; one rank then merges these as the
splitter does. Loading: each rank reads just its bytes. Optimizer moments take the same way, since
they have the parameters' shapes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qwen2_ascend.checkpoint.adapter_rules import adapter_pieces, peft_pieces
from qwen2_ascend.checkpoint.copying import BandBuffers, Reader, write_bands
from qwen2_ascend.checkpoint.formats.peft_adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    encode_config,
    held_tensors,
    read_lora_config,
)
from qwen2_ascend.checkpoint.formats.safetensors import encode_header
from qwen2_ascend.checkpoint.formats.stored import FileLayout, StoredTensor, TensorSpec
from qwen2_ascend.checkpoint.load import Slices, load_slices
from qwen2_ascend.checkpoint.plan import StoredSlice, make_plan
from qwen2_ascend.checkpoint.rules import Box, TensorSlice
from qwen2_ascend.checkpoint.slices import parts_of
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.dtypes import DTYPE_NAMES
from qwen2_ascend.errors import raise_if
from qwen2_ascend.files import write_file, written_whole
from qwen2_ascend.finetuning.lora import lora_state
from qwen2_ascend.lora_config import LoraConfig
from qwen2_ascend.parallel import ParallelLayout
from qwen2_ascend.training.rank_state import RankState
from qwen2_ascend.training.saving import RankPart, Store

_RANKS_FOLDER = ".ranks"


def adapter_state(
    chunks: Sequence[Any],
    lora: LoraConfig,
    config: Qwen2Config,
    layout: ParallelLayout,
    optimizer: Any = None,
) -> RankState:
    """This rank's adapters, and the optimizer's tensors of them; None leaves those out."""
    return RankState(lora_state(chunks), adapter_pieces(config, lora, layout), optimizer)


class Part(NamedTuple):
    """A box of an adapter's tensor in the file of the rank that has it."""

    kind: str
    """The kind of the optimizer's tensor; "" is the adapter itself."""
    tensor: str
    box: Box
    file: str
    offset: int
    dtype: str

    def held(self, folder: Path) -> StoredSlice:
        """The box as a source for merging."""
        shape = tuple(stop - start for start, stop in self.box)
        stored = StoredTensor(folder / self.file, self.offset, shape, self.dtype)
        return StoredSlice(self.tensor, TensorSlice(self.tensor, self.box, shape), stored)


def lay_out_adapter(state: RankState, rank: int) -> tuple[RankPart, list[Part]]:
    """This rank's file of its own elements, and what lies where in it."""
    file, end = f"{_RANKS_FOLDER}/{rank:05d}", 0
    parts, stores = [], []
    for owned, tensor in zip(state.owned, state.tensors(), strict=True):
        start = owned.run.start
        for box, run in parts_of(owned.piece.box, owned.run, joins_blocks=True):
            own = tensor[run.start - start : run.stop - start]
            dtype, name = owned.written_dtype(tensor), f"{owned.kind}{owned.name}{box}"
            named = DTYPE_NAMES[dtype]
            parts.append(Part(owned.kind, owned.piece.tensor, box, file, end, named))
            stores.append(Store(name, file, end, tuple(own.shape), own, dtype))
            end += stores[-1].num_bytes
    return RankPart(files={file: FileLayout(total_bytes=end, segments=())}, stores=stores), parts


def merge_adapter(
    folder: Path,
    parts: Sequence[Part],
    lora: LoraConfig,
    config: Qwen2Config,
    base_model: str | None,
) -> None:
    """Makes a PEFT folder, with a file for each kind of moments, of all ranks' files; on one rank.

    Raises:
        OSError: it cannot be written.
    """
    pieces = peft_pieces(config, lora)
    for kind in dict.fromkeys(part.kind for part in parts):
        name = f"{kind}.safetensors" if kind else WEIGHTS_FILE
        sources = [part.held(folder) for part in parts if part.kind == kind]
        _merge(sources, pieces, folder / name)
    shutil.rmtree(folder / _RANKS_FOLDER)
    write_file(folder / CONFIG_FILE, encode_config(lora, base_model))


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
    state = adapter_state(chunks, lora, config, layout)
    load_adapter_slices(state.whole(), lora, config, Path(folder) / WEIGHTS_FILE)


def load_adapter_slices(slices: Slices, lora: LoraConfig, config: Qwen2Config, path: Path) -> None:
    """Fills runs of adapters' elements from a file of `merge_adapter`, or PEFT; values are cast.

    Raises:
        UserError: the file's tensors are not those of this adapter and model.
    """
    # rows of lora_B that belong to no target are stored nowhere
    load_slices(slices, held_tensors(path, config, lora), config.vocab_size, is_sparse=True)


def _merge(sources: Sequence[StoredSlice], pieces: Mapping[str, TensorSlice], path: Path) -> None:
    """Writes `path` with all of `pieces` beside its place, and renames it."""
    (dtype,) = {held.stored.dtype for held in sources}
    specs = {name: TensorSpec(piece.shape, dtype) for name, piece in pieces.items()}
    header, offsets = encode_header(specs, {"format": "pt"})
    buffers = BandBuffers()
    with Reader() as reader, written_whole(path) as file:
        beside = Path(file.name)
        targets = [
            StoredSlice(name, piece, StoredTensor(beside, offsets[name], piece.shape, dtype))
            for name, piece in pieces.items()
        ]
        plan = make_plan(sources, targets, vocab_size=0)
        file.write(header)
        for write in plan.writes:
            start = write.target.stored.offset

            def put(position: int, band: np.ndarray, start: int = start) -> None:
                file.seek(start + position)
                file.write(band.reshape(-1).view(np.uint8).data)

            write_bands(write, reader, buffers, put)


def _text(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)
