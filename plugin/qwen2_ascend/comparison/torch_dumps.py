"""The arrays of a `.pt`, which torch reads; nothing is unpickled (weights_only=True).

Dumps of other kinds are compared without torch.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from qwen2_ascend.checkpoint.formats.stored import NUMPY_DTYPES
from qwen2_ascend.checkpoint.formats.torch_pt import check_size
from qwen2_ascend.comparison.statistics import dtype_name, is_comparable
from qwen2_ascend.errors import UserError
from qwen2_ascend.files import open_regular

MAX_DEPTH = 64
MAX_VALUES = 200_000
"""The most values in containers."""

Array = tuple[str, tuple[int, ...], str, Callable[[], np.ndarray] | None]
"""Name in the file, shape, dtype, and what loads it; None for a dtype that is not compared."""


def read_pt(path: Path) -> Iterator[Array]:
    """The tensors and numbers of a file.

    Raises:
        UserError: it asks for code, or holds too many values.
    """
    walk = _leaves(_load_pt(path), f"{path}: holds more than {MAX_VALUES} values.", count())
    return (_array(name, leaf) for name, leaf in walk)


def _load_pt(path: Path) -> Any:
    check_size(path)
    with open_regular(path) as file:
        # else written by torch before 1.6, which cannot be mapped
        is_zip = file.read(4) == b"PK\3\4"
    # Namespaces are Megatron's arguments beside the weights; they hold no code
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except UnpicklingError as error:
            refused = re.search(
                r"GLOBAL (\S+) (was not an allowed global|whose module \S+ is blocked)", str(error)
            )
            if refused is None:
                raise
            raise UserError(
                f"{path}: asks for {refused[1]}; refused, not executed. Only tensors and plain "
                "containers are read; save a dict of tensors, or use safetensors."
            ) from None


def _leaves(
    obj: Any, fault: str, visits: Iterator[int], name: str = "", depth: int = 0
) -> Iterator[tuple[str, Any]]:
    """Tensors and numbers, by the keys and indices that lead to them with dots between.

    Raises:
        UserError: `fault`, where `visits` says that there were too many. A file of 500 bytes can
            hold a list ten times in a list that is ten times in the next, and so on.
    """
    if next(visits) > MAX_VALUES:
        raise UserError(fault)
    if isinstance(obj, torch.Tensor | bool | int | float):
        yield name, obj
    elif depth < MAX_DEPTH and isinstance(obj, Mapping | list | tuple):
        items = obj.items() if isinstance(obj, Mapping) else enumerate(obj)
        for key, value in items:
            inner = f"{name}.{key}" if name else str(key)
            yield from _leaves(value, fault, visits, inner, depth + 1)


def _array(name: str, leaf: torch.Tensor | bool | int | float) -> Array:
    if not isinstance(leaf, torch.Tensor):
        array = np.asarray(leaf, dtype=object if _is_huge(leaf) else None)
        known = is_comparable(array.dtype)
        kind = dtype_name(array.dtype) if known else "a huge integer"
        return name, (), kind, (lambda: array) if known else None
    dtype = _TORCH_DTYPES.get(str(leaf.dtype))
    shape = tuple(leaf.shape)
    if dtype is None or leaf.layout != torch.strided or leaf.is_quantized or leaf.is_meta:
        kind = "" if leaf.layout == torch.strided else f", {leaf.layout}"
        return name, shape, f"{leaf.dtype}{kind}".replace("torch.", ""), None
    plain = leaf.detach()
    return name, shape, dtype_name(dtype), lambda: to_numpy(plain)


def _is_huge(number: bool | int | float) -> bool:
    return isinstance(number, int) and not -(2**63) <= number < 2**63


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The same memory, of a tensor on the host without a graph; numpy knows bf16 by ml_dtypes."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(NUMPY_DTYPES["bf16"])
    return tensor.resolve_neg().numpy()


_TORCH_DTYPES = {
    f"torch.{name}": np.dtype(name)  # ml_dtypes has told numpy of bfloat16
    for name in (
        *("bfloat16", "float16", "float32", "float64", "bool", "int8", "int16", "int32", "int64"),
        *("uint8", "uint16", "uint32", "uint64"),
    )
}
