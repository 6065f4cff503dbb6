"""The state of every random number generator of this rank, in tensors and plain numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel

from qwen2_ascend.runtime import Runtime


def rng_state(runtime: Runtime) -> dict[str, Any]:
    """Python's, numpy's, torch's and the device's generators, and megatron-core's trackers."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "trackers": {name: value.clone() for name, value in _tracker().get_states().items()},
    }
    if runtime.name != "cpu":
        state["device"] = torch.get_device_module(runtime.device).get_rng_state()
    return state


def set_rng_state(runtime: Runtime, state: dict[str, Any]) -> None:
    """Puts back what `rng_state` gave; a generator of another kind of device is left alone."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if runtime.name != "cpu" and "device" in state:
        torch.get_device_module(runtime.device).set_rng_state(state["device"])
    if (runtime.name == "cpu") == ("device" not in state):
        _tracker().set_states(state["trackers"])


def _tracker() -> Any:
    return tensor_parallel.get_cuda_rng_tracker()
