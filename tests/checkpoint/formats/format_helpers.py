"""What the tests of several formats share."""

from pathlib import Path

import numpy as np

from qwen2_ascend.checkpoint.formats.stored import FileLayout, StoredTensor, TensorSpec


def write_layout(layout: FileLayout, path: Path) -> Path:
    """The file of a layout, with holes where the tensors go."""
    with path.open("wb") as file:
        file.truncate(layout.total_bytes)
        for offset, data in layout.segments:
            file.seek(offset)
            file.write(data)
    return path


def fill(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def random_bytes(spec: TensorSpec, seed: int) -> bytes:
    data = np.random.default_rng(seed).integers(0, 256, spec.num_bytes, dtype=np.uint8)
    return (data % 2 if spec.dtype == "bool" else data).tobytes()


def stored_bytes(tensor: StoredTensor) -> bytes:
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        return file.read(tensor.num_bytes)
