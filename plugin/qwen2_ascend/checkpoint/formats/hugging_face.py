"""Hugging Face model folders: config.json, safetensors files and their index, and what goes along.

Reading is strict, because nothing else notices: an index may name files that are missing or lie
elsewhere, leave tensors out, or be a stale one beside a newer model.safetensors.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qwen2_ascend.checkpoint.formats.safetensors import encode_header, read_header
from qwen2_ascend.checkpoint.formats.stored import FileLayout, StoredTensor, TensorSpec
from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.files import read_json
from qwen2_ascend.pretrained import TOKENIZER_FILES

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SIDE_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)
"""Carried along with the weights, byte for byte, where they exist."""


class WeightFile(NamedTuple):
    """One safetensors file to be written."""

    name: str
    header: bytes
    tensors: dict[str, tuple[int, TensorSpec]]
    """Absolute file offset and spec by name."""

    @property
    def total_bytes(self) -> int:
        ends = (offset + spec.num_bytes for offset, spec in self.tensors.values())
        return max(ends, default=len(self.header))

    @property
    def layout(self) -> FileLayout:
        return FileLayout(total_bytes=self.total_bytes, segments=((0, self.header),))


def is_model_folder(folder: Path) -> bool:
    return (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file()


def side_files(folder: Path) -> tuple[Path, ...]:
    """The files beside the weights that a merged model needs to be usable."""
    return tuple(folder / name for name in SIDE_FILES if (folder / name).exists())


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder by name, in the order of its files.

    Raises:
        UserError: missing, stale, damaged or contradicting files; every fault at once.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.exists() and index.exists():
        raise UserError(
            f"{folder}: has both {SINGLE_FILE} and {INDEX_FILE}; one is stale. Remove it."
        )
    if single.exists():
        return read_header(single).tensors
    if not index.exists():
        raise UserError(_no_weights(folder))
    weight_map = _read_weight_map(index)
    raise_if(_misplaced(folder, weight_map))
    return _read_indexed(folder, weight_map)


def plan_files(
    tensors: Mapping[str, TensorSpec], max_shard_bytes: int, marks: Mapping[str, str] | None = None
) -> tuple[WeightFile, ...]:
    """Cuts tensors, in their order, into files of at most `max_shard_bytes` as transformers does.

    A tensor larger than that gets a file of its own. `marks` are added to each file's metadata.
    """
    groups: list[dict[str, TensorSpec]] = [{}]
    used = 0
    for name, spec in tensors.items():
        if groups[-1] and used + spec.num_bytes > max_shard_bytes:
            groups.append({})
            used = 0
        groups[-1][name] = spec
        used += spec.num_bytes
    count = len(groups)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return tuple(
        weight_file(SINGLE_FILE if count == 1 else name, group, marks)
        for name, group in zip(names, groups, strict=True)
    )


def index_json(files: tuple[WeightFile, ...]) -> bytes | None:
    """The contents of model.safetensors.index.json, or None for a single file."""
    if len(files) == 1:
        return None
    weight_map = {name: file.name for file in files for name in file.tensors}
    total = sum(spec.num_bytes for file in files for _, spec in file.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def weight_file(
    name: str, tensors: Mapping[str, TensorSpec], marks: Mapping[str, str] | None
) -> WeightFile:
    """Lays out one file; `marks` are added to its metadata."""
    header, offsets = encode_header(tensors, {"format": "pt", **(marks or {})})
    return WeightFile(name, header, {n: (offsets[n], spec) for n, spec in tensors.items()})


def _read_weight_map(index: Path) -> dict[str, str]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(key for key, _ in pairs)
        raise_if(f"{index}: key {k!r} stands in it {n} times." for k, n in counts.items() if n > 1)
        return dict(pairs)

    raw = read_json(index, object_pairs_hook=no_duplicates)
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(
            f"{index}: not a safetensors index: it has no weight_map, a table of tensor names and "
            "file names."
        )
    return weight_map


def _misplaced(folder: Path, weight_map: Mapping[str, str]) -> list[str]:
    faults = []
    for name in sorted(set(weight_map.values())):
        if name in (".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
            faults.append(f"{folder / INDEX_FILE}: names {name!r}, outside the folder; refused.")
        elif not (folder / name).is_file():
            faults.append(f"{folder / INDEX_FILE}: names {name}, which is missing.")
    return faults


def _read_indexed(folder: Path, weight_map: Mapping[str, str]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    faults: list[str] = []
    for file in sorted(set(weight_map.values())):
        found = read_header(folder / file).tensors
        named = {name for name, where in weight_map.items() if where == file}
        faults += [
            f"{folder / file}: lacks {n}, which the index places there."
            for n in sorted(named - set(found))
        ]
        faults += [
            f"{folder / file}: holds {n}, which the index does not place there."
            for n in sorted(set(found) - named)
        ]
        tensors |= found
    raise_if(faults)
    return tensors


def hub_hint(folder: Path) -> str:
    """A way out where a model seems to have been given as a hub calls it."""
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        return ""
    return " If that is a model's name on a hub, download it, and name the folder that it is in."


def _no_weights(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return (
            f"{folder}: is a PEFT adapter, which holds no model; name the folder of the model it "
            "was made for, and this one with --adapter, or with --lora-load to train it on."
        )
    if any(folder.glob("pytorch_model*.bin")):
        return (
            f"{folder}: holds pytorch_model*.bin only; save it as safetensors first "
            "(transformers: model.save_pretrained)."
        )
    loose = sorted(path.name for path in folder.glob("*.safetensors"))
    if loose:
        return f"{folder}: holds {', '.join(loose[:3])} but no {INDEX_FILE}; it is incomplete."
    return f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}."
