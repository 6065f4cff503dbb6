"""PyTorch's `.pt` files, read and laid out in place without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

KeyPath = tuple[Any, ...]
"""Keys from the root to one leaf: dict keys, list indices and Namespace attribute names."""


@dataclass(frozen=True, kw_only=True)
class PtLayout:
    """A `.pt` file to be: create it with `total_bytes`, write `segments`, then fill the tensors."""

    total_bytes: int
    segments: tuple[tuple[int, bytes], ...]
    """(file offset, bytes) of everything that is not tensor data."""
    offsets: dict[KeyPath, int]
    """File offset of every TensorSpec's bytes, by its path, in the order of the file."""


def read(path: str | Path) -> Any:
    """The object in a `.pt` file, with a StoredTensor wherever torch.load would give a tensor.

    Raises:
        UserError: not a zip of torch.save, a damaged one, or one whose pickle asks for anything
            but tensors, plain containers and the few known records (it is refused, not executed).
    """
    raise NotImplementedError


def layout_pt(obj: Any, name: str = "archive") -> PtLayout:
    """Lays out the file that torch.save would write for `obj`.

    Args:
        obj: dicts, lists, tuples, argparse.Namespace, scalars and strings, with a TensorSpec
            wherever a tensor goes.
        name: the zip's inner folder.
    """
    raise NotImplementedError
