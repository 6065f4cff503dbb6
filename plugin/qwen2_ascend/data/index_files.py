"""The files of Megatron's indexed datasets as far as they can be judged without megatron-core."""

from __future__ import annotations

import struct
from pathlib import Path

from qwen2_ascend.errors import UserError
from qwen2_ascend.files import open_regular

HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, code of the dtype, number of sequences, number of documents and one."""
MAGIC = b"MMIDIDX\0\0"
DTYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}
"""Bytes of a token by the dtype's code (uint8, int8, int16, int32, int64, fp64, fp32, uint16)."""
LENGTH, POINTER = struct.Struct("<i"), struct.Struct("<q")


def token_dtype(num_tokens: int) -> str:
    """The dtype of ids below `num_tokens`, as megatron-core's DType.optimal_dtype chooses it."""
    return "uint16" if num_tokens < 65500 else "int32"


def check_indexed(prefix: str | Path) -> None:
    """Checks `PREFIX.bin` and `PREFIX.idx`; reads the head of the latter alone.

    Raises:
        UserError: a file is missing, cannot be read, is empty, is not what it should be, or does
            not fit the other.
    """
    prefix = str(prefix)
    paths = [Path(prefix + suffix) for suffix in (".bin", ".idx")]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such file; {_prefix_hint(prefix)}")
    try:
        with open_regular(paths[0]):
            found = paths[0].stat().st_size
        if found == 0:
            raise UserError(f"{prefix}.bin is empty; preprocess the data again.")
        expected = _described_bytes(paths[1])
    except OSError as error:
        raise UserError(f"{prefix}: .bin or .idx cannot be read: {error.strerror}.") from None
    if found != expected:
        raise UserError(
            f"{prefix}.bin has {found} bytes, {prefix}.idx describes {expected}; "
            "they are not of one run, or the copy is not complete."
        )


def _described_bytes(path: Path) -> int:
    """Bytes of the .bin file that an index says.

    Raises:
        UserError: it is no index, is cut short, or holds nothing.
    """
    with open_regular(path) as file:
        header = file.read(HEADER.size)
        if len(header) < HEADER.size:
            header = bytes(HEADER.size)
        magic, version, code, sequences, documents = HEADER.unpack(header)
        if magic != MAGIC or version != 1 or code not in DTYPE_BYTES:
            raise UserError(f"{path} is not an index of Megatron's (version 1).")
        expected = HEADER.size + sequences * (LENGTH.size + POINTER.size) + documents * POINTER.size
        if (found := path.stat().st_size) < expected:
            raise UserError(
                f"{path} has {found} bytes and should have {expected}; it was cut short."
            )
        if not sequences or not documents:
            raise UserError(f"{path} holds no document.")
        # all lengths, then all pointers: the last of each
        file.seek(HEADER.size + (sequences - 1) * LENGTH.size)
        (length,) = LENGTH.unpack(file.read(LENGTH.size))
        file.seek((sequences - 1) * POINTER.size, 1)
        (pointer,) = POINTER.unpack(file.read(POINTER.size))
        file.seek((documents - 1) * POINTER.size, 1)
        (end,) = POINTER.unpack(file.read(POINTER.size))
    if end != sequences:
        raise UserError(f"{path} is damaged: it has {sequences} sequences, its documents {end}.")
    return pointer + length * DTYPE_BYTES[code]


def _prefix_hint(prefix: str) -> str:
    path = Path(prefix)
    if path.suffix in (".bin", ".idx"):
        return f"give the prefix without {path.suffix}: {path.with_suffix('')}"
    near = sorted(p.stem for p in path.parent.glob(f"{path.name}*.idx"))
    if near:
        return f"in {path.parent} there is {', '.join(near[:5])}."
    return "give the prefix of a .bin/.idx pair, as qwen2-ascend preprocess writes it."
