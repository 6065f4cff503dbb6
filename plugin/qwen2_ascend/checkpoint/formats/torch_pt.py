"""PyTorch's `.pt` files, read and laid out in place without torch.

A `.pt` is a zip (`zips.py`) of a pickle, `NAME/data.pkl`, and one raw storage `NAME/data/K` per
tensor. Reading gives the pickled object with a StoredTensor, a byte range of the file, wherever
torch.load would give a tensor; nothing in the pickle is executed (`pickles.py`). Writing gives the
bytes around the tensors' data and where that data goes.

The files written are torch 2.13's own but for three things: CRCs are zero (see `zips.py`), tensors
that shared a storage are written apart, and there is no `.data/serialization_id`, a hash that
torch.load merely logs.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from qwen2_ascend.checkpoint.formats import pickles
from qwen2_ascend.checkpoint.formats.pickles import (
    PLAIN,
    Call,
    DType,
    Maker,
    Name,
    PersistentId,
    PickleFault,
    known_records,
    read_pickle,
    write_pickle,
)
from qwen2_ascend.checkpoint.formats.stored import (
    NUMPY_DTYPES,
    FileLayout,
    StoredTensor,
    TensorSpec,
    is_shape,
    is_size,
)
from qwen2_ascend.checkpoint.formats.zips import ALIGNMENT, Record, ZipFault, layout_zip, read_zip
from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.files import open_regular, reading

MAX_PICKLE_BYTES = 1 << 24
"""The largest data.pkl; a tensor takes about 250 bytes in it, Qwen2-72B about 250 KB."""

KeyPath = tuple[Any, ...]
"""Keys from the root to one leaf: dict keys, list indices and Namespace attribute names."""

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
DTYPES |= {name: name for name in ("int8", "uint8", "int32", "int64", "bool")}
"""Our dtype names to torch's."""

_STORAGES = {
    "BFloat16Storage": "bfloat16",
    "HalfStorage": "float16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "BoolStorage": "bool",
    "ShortStorage": "int16",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
_OTHER_DTYPES = (
    *("int16", "uint16", "uint32", "uint64", "complex32", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
_ITEM_BYTES = {theirs: NUMPY_DTYPES[ours].itemsize for ours, theirs in DTYPES.items()} | {
    "int16": 2,
    "complex64": 8,
    "complex128": 16,
}
OURS = {theirs: ours for ours, theirs in DTYPES.items()}
"""This maps torch's names of dtypes to ours."""
_UNTYPED = "torch.storage.UntypedStorage"


@dataclass(frozen=True, kw_only=True)
class PtLayout(FileLayout):
    """A `.pt` file to be."""

    offsets: dict[KeyPath, int]
    """File offset of every TensorSpec's bytes, by its path, in the order of the file."""


def read(path: str | Path) -> Any:
    """The object in a `.pt` file, with a StoredTensor wherever torch.load would give a tensor.

    OrderedDicts come back as dicts and parameters as tensors; dtypes as `pickles.DType`; enums,
    paths, devices and numpy's arrays (RNG states) as `pickles.Inert` records.

    Raises:
        UserError: not a zip of torch.save, a damaged one, or one whose pickle asks for anything
            but tensors, plain containers and the few known records (it is refused, not executed).
    """
    path = Path(path)
    with reading(path), open_regular(path) as file:
        num_bytes = file.seek(0, 2)
        file.seek(0)
        raise_if(f"{path}: {fault}" for fault in _container_faults(file.read(8)))
        return read_part(file, path, 0, num_bytes)


def read_part(file: BinaryIO, path: Path, start: int, num_bytes: int) -> Any:
    """The contents of a torch.save that is `num_bytes` of `file` from `start`, as by `read`.

    Raises:
        UserError: as `read`.
    """
    what = str(path) if start == 0 else f"{path} (from byte {start})"
    try:
        records = read_zip(file, start, num_bytes)
        folder, data = _data_pkl(file, records)
    except ZipFault as fault:
        raise UserError(f"{what}: {fault}.") from None
    storages = _Storages(path, folder, records)
    obj = read_pickle(data, f"{what}: data.pkl", _known(storages), storages.find)
    faults = (f"{what}: tensor {name}: {leaf.reason}." for name, leaf in _unreadable(obj))
    raise_if(faults)
    return obj


def check_size(path: str | Path) -> None:
    """Checks that the pickle of a file for torch.load makes no more than its size allows.

    Raises:
        UserError: it makes far more. Whatever else is wrong with it is left to torch.load.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        num_bytes = file.seek(0, 2)
        try:
            data = _data_pkl(file, read_zip(file, 0, num_bytes))[1]
        except ZipFault:  # perhaps one bare pickle, as torch wrote before 1.6
            file.seek(0)
            data = file.read(MAX_PICKLE_BYTES)
    pickles.check_size(data, str(path))


def layout_pt(obj: Any, name: str = "archive") -> PtLayout:
    """Lays out the file that torch.save would write for `obj`.

    Args:
        obj: dicts, lists, tuples, argparse.Namespace, scalars and strings, `pickles.DType`, with a
            TensorSpec wherever a tensor goes. Each TensorSpec gets bytes of its own.
        name: the zip's inner folder.

    Raises:
        TypeError: `obj` holds anything else.
    """
    leaves = list(_tensor_leaves(obj, ()))
    keys = iter(range(len(leaves)))

    def expand(leaf: Any) -> Any:
        return _rebuild_call(leaf, next(keys)) if isinstance(leaf, TensorSpec) else leaf

    data_pkl = write_pickle(obj, expand)
    assert len(data_pkl) <= MAX_PICKLE_BYTES, f"a data.pkl of {len(data_pkl)} bytes"
    sizes = {f"{name}/data/{key}": spec.num_bytes for key, (_, spec) in enumerate(leaves)}
    layout = layout_zip(
        {
            f"{name}/data.pkl": data_pkl,
            f"{name}/.format_version": b"1",
            f"{name}/.storage_alignment": str(ALIGNMENT).encode(),
            f"{name}/byteorder": b"little",
            **sizes,
            f"{name}/version": b"3\n",
        }
    )
    offsets = {
        path: layout.offsets[record] for (path, _), record in zip(leaves, sizes, strict=True)
    }
    assert len(offsets) == len(leaves), "two tensors have the same path"
    return PtLayout(total_bytes=layout.total_bytes, segments=layout.segments, offsets=offsets)


# -- writing


def _tensor_leaves(obj: Any, path: KeyPath) -> Iterator[tuple[KeyPath, TensorSpec]]:
    """Every TensorSpec with its path, in the order in which the pickle is written."""
    if isinstance(obj, TensorSpec):
        yield path, obj
    for key, value in _children(obj):
        yield from _tensor_leaves(value, (*path, key))


def _children(obj: Any) -> Iterator[tuple[Any, Any]]:
    """(key, value) of one container's contents; nothing for a leaf."""
    if isinstance(obj, dict):
        yield from obj.items()
    elif isinstance(obj, argparse.Namespace):
        yield from vars(obj).items()
    elif type(obj) in (list, tuple):
        yield from enumerate(obj)


def _rebuild_call(spec: TensorSpec, key: int) -> Call:
    dtype = DTYPES[spec.dtype]
    storage = next(name for name, of in _STORAGES.items() if of == dtype)
    numel = prod(spec.shape)
    return Call(
        Name("torch._utils", "_rebuild_tensor_v2"),
        (
            PersistentId(("storage", Name("torch", storage), str(key), "cpu", numel)),
            0,
            tuple(spec.shape),
            _row_major(spec.shape),
            False,
            Call(Name("collections", "OrderedDict"), ()),
        ),
    )


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides torch gives a contiguous tensor, in elements."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


# -- reading


def _container_faults(first: bytes) -> Iterator[str]:
    if not first:
        yield "is empty; copy or download it again."
    elif first.startswith(b"\x80"):
        yield (
            "is in PyTorch's format before 1.6 (a bare pickle, not a zip), which is not read. If "
            "you trust it, save it again: torch.save(torch.load(FILE, weights_only=True), FILE)."
        )
    elif not first.startswith(b"PK\3\4"):
        yield f"starts with {first!r}, not as a zip of torch.save does; not a .pt file."


def _data_pkl(file: BinaryIO, records: dict[str, Record]) -> tuple[str, bytes]:
    """The zip's inner folder, and its data.pkl."""
    pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise ZipFault(f"has {len(pickles)} records */data.pkl instead of one; no torch.save")
    folder = pickles[0].removesuffix("/data.pkl")
    if f"{folder}/constants.pkl" in records:
        raise ZipFault("is a TorchScript module; save its state_dict() instead")
    order = records.get(f"{folder}/byteorder")
    if order is not None and _read(file, order, 16) != b"little":
        raise ZipFault("has big-endian tensors; save it again on a little-endian machine")
    return folder, _read(file, records[pickles[0]], MAX_PICKLE_BYTES)


def _read(file: BinaryIO, record: Record, limit: int) -> bytes:
    if record.num_bytes > limit:
        raise ZipFault(f"has a record of {record.num_bytes} bytes where at most {limit} are read")
    file.seek(record.offset)
    data = file.read(record.num_bytes)
    if record.crc and zlib.crc32(data) != record.crc:
        raise ZipFault("is damaged: a record does not have the checksum it was written with")
    return data


class _Storage(NamedTuple):
    """A storage record and the dtype it was saved as (None: bytes of any)."""

    record: Record
    dtype: str | None
    numel: int


@dataclass
class _Unreadable:
    """The stand-in for a tensor that is not a contiguous run of a dtype we know."""

    reason: str


class _Storages:
    """The raw storages of one zip, and the tensors that a pickle builds on them."""

    def __init__(self, path: Path, folder: str, records: dict[str, Record]) -> None:
        self.path = path
        self.folder = folder
        self.records = records

    def find(self, persistent_id: Any) -> _Storage:
        """What a persistent id `("storage", type, key, device, numel)` refers to."""
        if type(persistent_id) is not tuple or len(persistent_id) != 5:
            raise PickleFault("its storages are not written as torch.save does")
        word, kind, key, _, numel = persistent_id
        sound = word == "storage" and isinstance(kind, _StorageType) and is_size(numel)
        if not sound or type(key) is not str:
            raise PickleFault("its storages are not written as torch.save does")
        record = self.records.get(f"{self.folder}/data/{key}")
        if record is None:
            raise PickleFault(f"storage data/{key} is missing from the file")
        needed = numel * (_ITEM_BYTES[kind.dtype] if kind.dtype else 1)
        if record.num_bytes != needed:
            raise PickleFault(f"storage data/{key} has {record.num_bytes} bytes, not {needed}")
        return _Storage(record, kind.dtype, numel)

    def tensor(
        self, storage: Any, start: Any, shape: Any, strides: Any, *_: Any
    ) -> StoredTensor | _Unreadable:
        """torch._utils._rebuild_tensor_v2 and torch_npu's kin: a view of a storage.

        Start and strides are in elements.
        """
        if not isinstance(storage, _Storage):
            raise PickleFault("it builds a tensor on something other than a storage")
        return self._view(storage, storage.dtype or "uint8", start, shape, strides)

    def tensor_of_dtype(
        self, storage: Any, start: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any
    ) -> StoredTensor | _Unreadable:
        """torch._utils._rebuild_tensor_v3: as `tensor`, for dtypes without a storage class."""
        if not isinstance(storage, _Storage) or not isinstance(dtype, DType):
            raise PickleFault("it builds a tensor on something other than a storage")
        return self._view(storage, dtype.name, start, shape, strides)

    def _view(self, storage: _Storage, dtype: str, start: Any, shape: Any, strides: Any) -> Any:
        sizes = is_shape(shape) and is_shape(strides) and len(shape) == len(strides)
        if not sizes or not is_size(start):
            raise PickleFault("it builds a tensor of an impossible shape")
        if dtype not in OURS:
            return _Unreadable(f"dtype {dtype} is not one of {', '.join(OURS)}")
        spec = TensorSpec(tuple(shape), OURS[dtype])
        wanted = _row_major(spec.shape)
        is_row_major = all(n == 1 or a == b for n, a, b in zip(shape, strides, wanted, strict=True))
        if spec.num_bytes and not is_row_major:
            return _Unreadable(
                f"shape {spec.shape} has strides {tuple(strides)} instead of {wanted}; save it "
                "after .contiguous()"
            )
        offset = start * _ITEM_BYTES[dtype]
        if offset + spec.num_bytes > storage.record.num_bytes:
            raise PickleFault(
                f"a tensor of shape {spec.shape} {dtype} at {offset} needs more bytes than the "
                f"{storage.record.num_bytes} of its storage"
            )
        return StoredTensor(self.path, storage.record.offset + offset, *spec)


class _StorageType(NamedTuple):
    """torch.FloatStorage and its kin; dtype None is the untyped one."""

    dtype: str | None


def _known(storages: _Storages) -> dict[str, Any]:
    """Every name that a pickle in a `.pt` may use, and what becomes of it."""
    tensor = Maker("torch._utils._rebuild_tensor_v2", storages.tensor)
    of_dtype = Maker("torch._utils._rebuild_tensor_v3", storages.tensor_of_dtype)
    # the bytes are those of a copy on the host, whatever format the NPU kept the tensor in
    of_npu = Maker("torch_npu.utils.storage._rebuild_npu_tensor", storages.tensor)

    def rebuild(function: Any, tensor_type: Any, args: Any, *state: Any) -> Any:
        """torch._tensor._rebuild_from_type_v2: a tensor with attributes, which are dropped."""
        known = any(function is maker for maker in (tensor, of_dtype, of_npu))
        if not known or type(args) is not tuple:
            raise PickleFault("it builds a tensor subclass")
        return function.make(*args)

    def parameter(data: Any, *_: Any) -> Any:
        return data

    makers = [
        tensor,
        of_dtype,
        of_npu,
        Maker("torch._tensor._rebuild_from_type_v2", rebuild),
        Maker("torch._utils._rebuild_parameter", parameter),
        Maker("torch._utils._rebuild_parameter_with_state", parameter),
    ]
    known = PLAIN | TORCH_VALUES | _RECORDS | {maker.type_name: maker for maker in makers}
    known |= {f"torch.{name}": _StorageType(dtype) for name, dtype in _STORAGES.items()}
    known[_UNTYPED] = known["torch.UntypedStorage"] = _StorageType(None)
    return known


def _size(items: Any = ()) -> tuple[int, ...]:
    if not is_shape(items):
        raise PickleFault("it makes a torch.Size of something other than sizes")
    return tuple(items)


TORCH_VALUES: dict[str, Any] = {
    "torch.Size": Maker("torch.Size", _size),
    **{f"torch.{name}": DType(name) for name in (*OURS, *_OTHER_DTYPES)},
}
"""torch's names for values that are not tensors."""

_RECORDS = known_records(
    {
        "builtins": ("slice", "complex"),
        "io": ("BytesIO",),
        "_io": ("BytesIO",),
        "pathlib": ("PosixPath", "WindowsPath"),
        "pathlib._local": ("PosixPath",),
        "signal": ("Signals",),
        "types": ("SimpleNamespace",),
        "torch": ("device", "Tensor"),
        "torch_npu.npu._format": ("Format",),
        "torch.nn.parameter": ("Parameter",),
        "numpy": ("ndarray", "dtype"),
        "numpy.dtypes": ("UInt32DType",),
        "numpy.core.multiarray": ("_reconstruct", "scalar"),
        "numpy._core.multiarray": ("_reconstruct", "scalar"),
        "numpy.core.numeric": ("_frombuffer",),
        "numpy._core.numeric": ("_frombuffer",),
        "megatron.core.enums": ("ModelType", "Fp8Recipe", "Fp4Recipe"),
        "megatron.core.transformer.enums": (
            "ModelType",
            "LayerType",
            "AttnType",
            "AttnMaskType",
            "AttnBackend",
            "CudaGraphScope",
        ),
        "megatron.core.optimizer.optimizer_config": ("OptimizerConfig",),
        "megatron.core.rerun_state_machine": (
            "Call",
            "Caller",
            "RerunDiagnostic",
            "RerunMode",
            "RerunState",
            "RerunValidationStatus",
        ),
    }
)


def _unreadable(obj: Any) -> Iterator[tuple[str, _Unreadable]]:
    """Every unreadable tensor below `obj` with its dotted path; `obj` may be deep or cyclic."""
    stack: list[tuple[Any, Any]] = [((), obj)]
    seen: set[int] = set()
    while stack:
        path, value = stack.pop()
        if isinstance(value, _Unreadable):
            yield _dotted(path), value
        elif id(value) not in seen:
            seen.add(id(value))
            stack += (((path, key), child) for key, child in _children(value))


def _dotted(path: Any) -> str:
    """A path of nested pairs (path above, key), the empty tuple at the top."""
    keys = []
    while path:
        path, key = path
        keys.append(str(key))
    return ".".join(reversed(keys)) or "(the whole file)"
