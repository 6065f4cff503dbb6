"""What an opened checkpoint is, and the faults that the readers of all kinds can find.

A reader fits the tensors of one folder to the mapping table, from headers alone, before any byte
moves: missing and extra tensors, shapes, dtypes, all named at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qwen2_ascend.checkpoint.formats.stored import WEIGHT_DTYPES, StoredTensor
from qwen2_ascend.checkpoint.plan import StoredSlice
from qwen2_ascend.checkpoint.rules import TensorSlice
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError, at_most, name_faults, printable
from qwen2_ascend.parallel import ParallelLayout
from qwen2_ascend.progress import size_text


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened checkpoint: headers read and checked, no tensor data touched."""

    kind: str
    """ "hf" or "mg"."""
    folder: Path
    config: Qwen2Config
    held: tuple[StoredSlice, ...]
    side_files: tuple[Path, ...] = ()
    """config.json, tokenizer and chat template files."""
    format: str
    """"safetensors", "megatron" or "torch_dist"."""
    layout: ParallelLayout | None = None
    """How Megatron shards are cut; None where the files do not depend on a layout."""
    padded_vocab_size: int

    @property
    def dtypes(self) -> tuple[str, ...]:
        return tuple(sorted({held.stored.dtype for held in self.held}))

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(held.stored.path for held in self.held))

    def describe(self) -> str:
        """One line for a log."""
        size = size_text(sum(held.stored.num_bytes for held in self.held))
        cut = ""
        if self.layout is not None:
            cut = f", TP{self.layout.tp} PP{self.layout.pp}"
            if n := self.layout.num_layers_per_virtual_pipeline_stage:
                cut += f", {n} layers per virtual stage"
        return printable(
            f"{self.folder}: {'Hugging Face' if self.kind == 'hf' else 'Megatron shards'} "
            f"({self.format}){cut}, {len(self.held)} tensors, {size} {'/'.join(self.dtypes)}"
        )


def check_layer_count(where: Path | str, config: Qwen2Config, num_tensors: int) -> None:
    """Refuses a config that claims more layers than there are tensors, before enumerating any."""
    if config.num_layers > num_tensors:
        raise UserError(
            f"{where}: config.json says {config.num_layers} layers, "
            f"but there are only {num_tensors} tensors."
        )


def match(
    pieces: Mapping[str, TensorSlice], tensors: Mapping[str, StoredTensor]
) -> tuple[list[StoredSlice], list[str]]:
    """Pairs expected pieces with stored tensors; what does not fit, in sentences."""
    faults = name_faults("missing tensors", [n for n in pieces if n not in tensors])
    faults += name_faults("unexpected tensors", [n for n in tensors if n not in pieces])
    extra_layers = layers(tensors) - layers(pieces)
    if extra_layers:
        faults.append(
            f"the files hold layers up to {max(extra_layers)}, "
            f"config.json says {len(layers(pieces))} layers."
        )
    held = [
        StoredSlice(name, piece, tensors[name]) for name, piece in pieces.items() if name in tensors
    ]
    return held, faults + at_most([fault for one in held for fault in _tensor_faults(one)])


def _tensor_faults(held: StoredSlice) -> Iterator[str]:
    name, piece, stored = held
    if stored.shape != piece.shape:
        yield f"{name}: expected shape {piece.shape}, found {stored.shape} in {stored.path.name}."
    if stored.dtype not in WEIGHT_DTYPES:
        yield (
            f"{name}: dtype {stored.dtype} is none of {', '.join(WEIGHT_DTYPES)}, "
            f"in {stored.path.name}."
        )


def layers(names: Iterable[str]) -> set[int]:
    found = (re.search(r"\blayers\.(\d{1,9})\.", name) for name in names)
    return {int(match[1]) for match in found if match}
