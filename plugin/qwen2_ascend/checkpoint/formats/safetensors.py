"""The safetensors format: a header of names, dtypes, shapes and byte ranges, then the bytes.

A file is 8 bytes of header length (little-endian), a JSON object, and the tensors' bytes without a
gap. The check here is stricter than the library's own, which accepts a header that starts with a
space, duplicate keys (the last one wins) and names it does not know.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from qwen2_ascend.checkpoint.formats.stored import (
    MAX_AXES,
    NUMPY_DTYPES,
    StoredTensor,
    TensorSpec,
    is_shape,
)
from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.files import open_regular, parse_json, reading

MAX_HEADER_BYTES = 100_000_000
"""The library's own bound."""
ALIGNMENT = 64
"""Alignment of the first tensor's bytes, so that mapped tensors start on a cache line."""

DTYPES = {
    "BF16": "bf16",
    "F16": "fp16",
    "F32": "fp32",
    "F64": "fp64",
    "I8": "int8",
    "U8": "uint8",
    "I32": "int32",
    "I64": "int64",
    "BOOL": "bool",
}
"""The format's names for ours."""

_METADATA = "__metadata__"
_FIELDS = ("dtype", "shape", "data_offsets")


@dataclass(frozen=True, kw_only=True)
class SafetensorsHeader:
    """What one .safetensors file says it holds."""

    tensors: dict[str, StoredTensor]
    """The tensors by name, in the order of their bytes in the file."""
    metadata: dict[str, str]


def read_header(path: str | Path) -> SafetensorsHeader:
    """Reads and checks the header of one file; no tensor data is read.

    Raises:
        UserError: the file is not a whole, well-formed safetensors file; every fault at once.
    """
    path = Path(path)
    raw, data_start, file_bytes = _read_json(path)
    metadata = raw.pop(_METADATA, {})
    faults = list(_metadata_faults(metadata))
    for name, entry in raw.items():
        faults += (f"tensor {name!r}: {fault}" for fault in _entry_faults(entry))
    raise_if(f"{path}: {fault}" for fault in faults)

    ordered = sorted(raw.items(), key=lambda item: item[1]["data_offsets"])
    faults = list(_range_faults(ordered, file_bytes - data_start))
    raise_if(f"{path}: {fault}" for fault in faults)
    tensors = {
        name: StoredTensor(
            path,
            data_start + entry["data_offsets"][0],
            tuple(entry["shape"]),
            DTYPES[entry["dtype"]],
        )
        for name, entry in ordered
    }
    return SafetensorsHeader(tensors=tensors, metadata=metadata)


def encode_header(
    tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file that will hold `tensors`, and each one's absolute file offset.

    Tensors keep their order, except that wider dtypes go first, so that each lies at a multiple
    of its element size. The file ends with the last tensor.
    """
    assert _METADATA not in tensors, f"{_METADATA} cannot be a tensor's name"
    names = {ours: theirs for theirs, ours in DTYPES.items()}
    wide_first = sorted(tensors, key=lambda name: -NUMPY_DTYPES[tensors[name].dtype].itemsize)
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    starts, end = {}, 0
    for name in wide_first:
        spec = tensors[name]
        starts[name], end = end, end + spec.num_bytes
        header[name] = {
            "dtype": names[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    assert len(text) <= MAX_HEADER_BYTES, f"a header of {len(text)} bytes is above the format's"
    data_start = 8 + len(text)
    offsets = {name: data_start + start for name, start in starts.items()}
    return len(text).to_bytes(8, "little") + text, offsets


def _read_json(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header's JSON object, the offset of the data, and the file's size in bytes."""
    with reading(path), open_regular(path) as file:
        file_bytes = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        raise_if(f"{path}: {fault}" for fault in _length_faults(length, file_bytes))
        text = file.read(length)
    if not text.startswith(b"{"):
        raise UserError(f"{path}: its header starts with {text[:1]!r}, not '{{'; not safetensors.")
    try:
        raw = parse_json(text, object_pairs_hook=_unique, parse_constant=_no_number)
    except UserError as error:
        raise UserError(f"{path}: its header: {fault}" for fault in error.faults) from None
    return raw, 8 + length, file_bytes


def _length_faults(length: int, file_bytes: int) -> Iterator[str]:
    if file_bytes < 8:
        yield f"{file_bytes} bytes long, too short for a safetensors file; copy it again."
    elif length > MAX_HEADER_BYTES:
        yield (
            f"its first 8 bytes ask for a header of {length} bytes, above the format's "
            f"{MAX_HEADER_BYTES}; not a safetensors file, or a damaged one."
        )
    elif 8 + length > file_bytes:
        yield (
            f"truncated inside its header, which ends at byte {8 + length}; "
            f"the file has {file_bytes}. Copy or download it again."
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict, or UserError if it names a key twice."""
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = {key: None for key, _ in pairs if key in seen or seen.add(key)}
        raise UserError(f"holds {key!r} more than once." for key in twice)
    return result


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is not a JSON number")


def _metadata_faults(metadata: Any) -> Iterator[str]:
    if not isinstance(metadata, dict):
        yield f"{_METADATA} is {type(metadata).__name__}, not an object of strings."
    elif bad := [key for key, value in metadata.items() if not isinstance(value, str)]:
        yield f"{_METADATA} must map strings to strings; {', '.join(bad)} does not."


def _entry_faults(entry: Any) -> Iterator[str]:
    """What is wrong with one tensor's entry on its own."""
    if not isinstance(entry, dict) or set(entry) != set(_FIELDS):
        got = _short(sorted(entry) if isinstance(entry, dict) else entry)
        yield f"its entry must have exactly {', '.join(_FIELDS)}; found {got}."
        return
    dtype, shape, offsets = (entry[field] for field in _FIELDS)
    sound = True
    if not isinstance(dtype, str) or dtype not in DTYPES:
        sound = False
        yield _dtype_fault(dtype)
    if not is_shape(shape):
        sound = False
        yield f"shape={_short(shape)} must be at most {MAX_AXES} whole numbers, none negative."
    if not is_shape(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        sound = False
        yield f"data_offsets={_short(offsets)} must be [begin, end] with 0 <= begin <= end."
    if not sound:
        return
    needed, given = prod(shape) * NUMPY_DTYPES[DTYPES[dtype]].itemsize, offsets[1] - offsets[0]
    if needed != given:
        yield f"shape={shape} of {dtype} takes {needed} bytes, data_offsets={offsets} give {given}."


def _dtype_fault(dtype: Any) -> str:
    if isinstance(dtype, str) and dtype.startswith(("F8", "F4", "F6")):
        why = "a quantized checkpoint; convert the unquantized one"
    else:
        why = "no Qwen2 weight has it"
    return f"dtype {_short(dtype)} is not one of {', '.join(DTYPES)} ({why})."


def _range_faults(ordered: list[tuple[str, dict[str, Any]]], data_bytes: int) -> Iterator[str]:
    """Overlaps, holes, and data that ends before or after the last tensor does."""
    end, previous = 0, "the header"
    for name, entry in ordered:
        begin, stop = entry["data_offsets"]
        if begin < end:
            yield f"tensor {name!r}: its bytes {begin}..{stop} overlap those of {previous}."
        elif begin > end:
            yield f"tensor {name!r}: {begin - end} bytes between {previous} and it are nobody's."
        if stop > data_bytes:
            yield (
                f"tensor {name!r}: truncated, its data ends at byte {stop} of {data_bytes} in the "
                "file; copy or download it again."
            )
        if stop >= end:
            end, previous = stop, f"tensor {name!r}"
    if end < data_bytes:
        yield f"{data_bytes - end} bytes follow {previous}; they are no tensor's."


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
