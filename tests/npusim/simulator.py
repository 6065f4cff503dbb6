"""The numbers behind torch_npu's genuine host code, when the device is host memory.

Below autograd every operator that touches an npu tensor comes here.

- `npu::` operators first run torch_npu's own C++ host code: argument checks, allocation of the
  outputs, marshalling of the aclnn call. No kernel follows, so the outputs are still poison; they
  are then filled by a reference in plain PyTorch. An operator without a reference is an error.
- aten operators run as CPU kernels on the same memory.

Autograd is torch_npu's own. Importing this module imports torch_npu: it must run in the
environment that env.py describes.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_npu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import npusim.fused_products  # noqa: F401  (registers its references)
from npusim.references import ATEN_REFERENCES, NPU_REFERENCES

_acl = ctypes.CDLL("libascendcl.so")
_acl.npusim_drain.argtypes = [ctypes.c_void_p]
_opapi = ctypes.CDLL("libopapi.so")
_opapi.npusim_record_stop.restype = ctypes.c_char_p

# Their own C++ does all there is to do.
WITHOUT_KERNEL = {"copy_memory_", "get_npu_format", "get_storage_size", "npu_format_cast"}
WITHOUT_KERNEL |= {"npu_format_cast_", "_npu_format_cast"}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
ALLOCATIONS |= {"is_pinned", "record_stream", "resize_", "set_"}
RANDOM = {"bernoulli", "cauchy", "exponential", "geometric", "log_normal", "multinomial"}
RANDOM |= {"native_dropout", "normal", "rand", "rand_like", "randint", "randint_like", "randn"}
RANDOM |= {"randn_like", "random", "randperm", "uniform"}
COMMUNICATION = {"c10d", "_c10d_functional", "c10d_functional", "npu_custom_dist"}


@dataclass(frozen=True)
class Launch:
    """One aclnn operator, as torch_npu's host code called it."""

    op: str
    """The operator, such as aclnnRmsNorm."""
    arguments: tuple[object, ...]
    """Tensors and arrays as text ("f32[3,4]", "f32[3,4] strided" if not contiguous, "[1,2]"), text
    in quotes, other words as integers; 0 for an absent tensor. Floating-point arguments are in
    `doubles` instead."""
    doubles: tuple[float, ...]
    """The eight floating-point registers; what the operator does not take is left over."""


@dataclass
class Recording:
    """What was launched between start and end of `recording()`."""

    launches: list[Launch] = field(default_factory=list)

    @property
    def ops(self) -> list[str]:
        return [launch.op for launch in self.launches]


@contextmanager
def recording() -> Iterator[Recording]:
    """Records the aclnn operators of the block; they are in the Recording afterwards.

    Of aten operators only with `Simulator(host_code=True)`.
    """
    record = Recording()
    _opapi.npusim_record_start()
    try:
        yield record
    finally:
        for line in _opapi.npusim_record_stop().decode().splitlines():
            launch = json.loads(line)
            record.launches.append(
                Launch(launch["op"], tuple(launch["arguments"]), tuple(launch["doubles"]))
            )


class Simulator(TorchDispatchMode):
    """Computes what the simulated device is asked for, while it is entered.

    Args:
        host_code: also runs the genuine host code of aten operators, on copies, so that
            `recording` sees their launches. What it raises is kept in `host_faults`: some of it
            reads results back in the middle of an operator, and those are poison.
    """

    def __init__(self, host_code: bool = False) -> None:
        super().__init__()
        self.host_code = host_code
        self.host_faults: dict[str, str] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "npu":
            return _run_npu(func, args, kwargs)
        if func.namespace in COMMUNICATION or not _concerns_npu(args, kwargs):
            return func(*args, **kwargs)
        if _name(func) in ALLOCATIONS or _is_view(func):
            return func(*args, **kwargs)
        if self.host_code:
            self._run_host_code(func, args, kwargs)
        return _run_aten(func, args, kwargs)

    def _run_host_code(self, func, args, kwargs) -> None:
        try:
            func(*tree_map(_copy, args), **tree_map(_copy, kwargs))
        except (RuntimeError, NotImplementedError) as error:
            self.host_faults[func.name()] = str(error)


def host_view(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor on the memory of an npu tensor; the npu tensor must outlive it."""
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    if size == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    memory = (ctypes.c_uint8 * size).from_address(storage.data_ptr())
    host = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    place = (tensor.storage_offset(), tensor.shape, tensor.stride())
    # the device is said because DeepSpeed's zero.Init gives whoever does not say it another one
    return torch.empty(0, dtype=tensor.dtype, device="cpu").set_(host, *place)


def _is_npu(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.device.type == "npu"


def _name(func) -> str:
    """aten::add_.Tensor is add_."""
    return func.name().split("::")[1].split(".")[0]


def _is_view(func) -> bool:
    aliases = [returned.alias_info for returned in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _concerns_npu(args, kwargs) -> bool:
    device = kwargs.get("device")
    if device is not None and torch.device(device).type == "npu":
        return True
    return any(_is_npu(x) for x in tree_leaves((args, kwargs)))


def _drain() -> None:
    """Waits for what was enqueued on the current stream: we compute at once, it may not."""
    device = torch_npu._C._npu_getDevice()
    _acl.npusim_drain(torch_npu._C._npu_getCurrentRawStream(device))


# --- npu:: operators ------------------------------------------------------------------------------


def _run_npu(func, args, kwargs):
    outputs = func(*args, **kwargs)
    name = _name(func)
    if name in WITHOUT_KERNEL:
        return outputs
    if name not in NPU_REFERENCES:
        raise NotImplementedError(f"{func.name()} has no reference in npusim/references.py")
    _drain()
    flat = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    inputs = tree_map(_to_host, _bind(func, args, kwargs))
    results = NPU_REFERENCES[name]([_to_host(x) for x in flat], **inputs)
    results = results if isinstance(results, tuple) else (results,)
    for output, result in zip(flat, results, strict=False):
        if not _is_npu(output) or result is None:
            continue
        assert output.shape == result.shape, (
            f"{func.name()}: torch_npu allocates {tuple(output.shape)}, "
            f"the reference gives {tuple(result.shape)}"
        )
        host_view(output).copy_(result)
    return outputs


def _bind(func, args, kwargs) -> dict[str, Any]:
    """The operator's arguments by name, with their defaults."""
    names = [argument.name for argument in func._schema.arguments]
    bound = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    return {**bound, **dict(zip(names, args, strict=False)), **kwargs}


def _to_host(x):
    return host_view(x) if _is_npu(x) else x


# --- aten operators -------------------------------------------------------------------------------


def _run_aten(func, args, kwargs):
    _drain()
    originals: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def to_host(x):
        if not _is_npu(x):
            return x
        view = host_view(x)
        originals[id(view)] = (view, x)
        return view

    target = _target_device(args, kwargs)
    args, kwargs = tree_map(to_host, args), tree_map(to_host, kwargs)
    kwargs = _on_cpu(kwargs)
    draws = nullcontext()
    if _name(func).rstrip("_") in RANDOM:
        draws = _npu_random_numbers((args, kwargs))
        args, kwargs = tree_map(_without_generator, args), tree_map(_without_generator, kwargs)
    with draws:
        result = ATEN_REFERENCES.get(_name(func), func)(*args, **kwargs)

    def back(x):
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) in originals:
            return originals[id(x)][1]
        return _to_npu(x, target) if target.type == "npu" else x

    return tree_map(back, result)


def _target_device(args, kwargs) -> torch.device:
    """Where new tensors go: where `device` says, else where the inputs are."""
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    return next(x.device for x in tree_leaves((args, kwargs)) if _is_npu(x))


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if kwargs.get("device") is not None:
        changes["device"] = torch.device("cpu")
    if kwargs.get("pin_memory"):
        changes["pin_memory"] = False
    return {**kwargs, **changes}


def _to_npu(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    new = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    if x.numel():
        host_view(new).copy_(x)
    return new


def _copy(x):
    """A copy with the whole storage, so that overlapping elements still overlap."""
    if not _is_npu(x):
        return x
    storage = _to_npu(host_view(_bytes(x)), x.device).untyped_storage()
    place = (x.storage_offset(), x.shape, x.stride())
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(storage, *place)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


def _without_generator(x):
    return None if isinstance(x, torch.Generator) else x


@contextmanager
def _npu_random_numbers(arguments) -> Iterator[None]:
    """Draws depend on the npu generator's seed and offset, and move its offset on."""
    generators = [x for x in tree_leaves(arguments) if isinstance(x, torch.Generator)]
    current = torch.npu.default_generators[torch_npu._C._npu_getDevice()]
    generator = generators[0] if generators else current
    if generator.device.type != "npu":
        raise NotImplementedError("a CPU generator for numbers on the npu")
    seed, offset = generator.initial_seed(), generator.get_offset()
    generator.set_offset(offset + 12)
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed((seed * 0x9E3779B97F4A7C15 + offset + 1) % 2**63)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
