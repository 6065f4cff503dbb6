"""The safetensors format: a header of names, dtypes, shapes and byte ranges, then the bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qwen2_ascend.checkpoint.formats.stored import StoredTensor, TensorSpec


@dataclass(frozen=True, kw_only=True)
class SafetensorsHeader:
    """What one .safetensors file says it holds."""

    tensors: dict[str, StoredTensor]
    """By name, in the order of their bytes in the file."""
    metadata: dict[str, str]


def read_header(path: str | Path) -> SafetensorsHeader:
    """Reads and checks the header of one file; no tensor data is read.

    Raises:
        UserError: the file is not a whole, well-formed safetensors file; every fault at once.
    """
    raise NotImplementedError


def encode_header(
    tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file that will hold `tensors`, and each one's absolute file offset."""
    raise NotImplementedError
