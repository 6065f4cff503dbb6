"""The state of every random number generator of this rank, under the names Megatron-LM gives it.

It is tensors and plain numbers; numpy's key is a tuple of numbers, not an array, so that every
reader takes it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel

from qwen2_ascend.errors import UserError
from qwen2_ascend.runtime import Runtime

_GENERATORS = (
    "random_rng_state",
    "np_rng_state",
    "torch_rng_state",
    "cuda_rng_state",
    "rng_tracker_states",
)


def rng_state(runtime: Runtime) -> dict[str, Any]:
    """Python's, numpy's, torch's and the device's generators, and megatron-core's trackers."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": (name, tuple(np.asarray(keys).tolist()), position, has_gauss, cached),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": _device_state(runtime),
        "rng_tracker_states": {
            name: value.clone() for name, value in _tracker().get_states().items()
        },
    }


def set_rng_state(runtime: Runtime, state: Mapping[str, Any]) -> None:
    """Puts back what `rng_state` gave; a generator of another kind of device is left alone.

    Args:
        state: its tuples may be lists, and numpy's key may be an array.

    Raises:
        UserError: it lacks a generator.
    """
    if lacking := [name for name in _GENERATORS if name not in state]:
        raise UserError(
            f"the saved random number generators lack {', '.join(lacking)}; --no-load-rng leaves "
            "them out."
        )
    version, words, gauss = state["random_rng_state"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["np_rng_state"]
    np.random.set_state((name, np.asarray(keys, np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch_rng_state"])
    size = _device_state(runtime).shape
    if runtime.name != "cpu" and state["cuda_rng_state"].shape == size:
        torch.get_device_module(runtime.device).set_rng_state(state["cuda_rng_state"])
    trackers = dict(state["rng_tracker_states"])
    if all(tracker.shape == size for tracker in trackers.values()):
        _tracker().set_states({**_tracker().get_states(), **trackers})


def _device_state(runtime: Runtime) -> torch.Tensor:
    """The state of the device's own generator; its size tells one kind of device from another."""
    if runtime.name == "cpu":
        return torch.get_rng_state()
    return torch.get_device_module(runtime.device).get_rng_state()


def _tracker() -> Any:
    return tensor_parallel.get_cuda_rng_tracker()
