"""What megatron-core needs to run on a plain CPU: its CUDA calls answered by the host.

Each of these was removed alone to see what breaks; `why` says what did.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

import torch
from torch.utils._device import _device_constructors

from qwen2_ascend.runtime.ledger import applied_during, apply

_CPU = torch.device("cpu")
_BLOCK = 4096
_UNTIL = "megatron-core asks torch.accelerator, or its CPU device, instead of torch.cuda"


def redirect_torch() -> None:
    """Answers torch.cuda calls with the CPU; before megatron.core is imported."""
    # `with torch.device("meta")` remembers the factories it steers at its first use: let it be the
    # real ones. With ours in their place transformers' from_pretrained leaves inv_freq unset.
    _device_constructors()
    apply(
        "torch:cuda.current_device",
        lambda original: lambda: _CPU,
        why="megatron-core allocates on torch.cuda.current_device() throughout",
        how="answers torch.device('cpu')",
        until=_UNTIL,
    )
    for factory in ("tensor", "zeros"):
        apply(
            f"torch:{factory}",
            _on_cpu,
            why="gradient norm, clipping and token counts are allocated with device='cuda'",
            how="device='cuda' becomes the CPU, anything else passes through",
            until=_UNTIL,
        )
    apply(
        "torch:Tensor.type",
        cuda_type_name,
        why="gradient clipping and the distributed optimizer accept torch.cuda.* tensors only",
        how="type() without arguments says torch.cuda.FloatTensor for torch.FloatTensor",
        until=_UNTIL,
    )
    apply(
        "torch:Tensor.cuda",
        lambda original: lambda self, *args, **kwargs: self,
        why="the last pipeline stage moves its copy of a tied embedding with .cuda()",
        how="answers the tensor itself",
        until=_UNTIL,
    )
    _redirect_streams_and_generator()


def _redirect_streams_and_generator() -> None:
    apply(
        "torch:cuda.synchronize",
        lambda original: lambda device=None: None,
        why="saving torch_dist waits for copies from the device that it has begun",
        how="returns at once: on the CPU nothing is under way",
        until=_UNTIL,
    )
    apply(
        "torch:cuda.current_stream",
        lambda original: lambda device=None: torch.cpu.current_stream(),
        why="before it reduces gradients megatron-core 0.19 takes the stream that CUDA graphs "
        "would be waited for on, with or without graphs",
        how="answers the CPU's stream, on which waiting does nothing",
        until=_UNTIL,
    )
    apply(
        "torch:cuda.get_rng_state",
        lambda original: lambda device="cuda": torch.get_rng_state(),
        why="the RNG tracker saves the CUDA generator before it forks; raises without CUDA",
        how="reads the CPU generator",
        until=_UNTIL,
    )
    apply(
        "torch:cuda.manual_seed",
        lambda original: lambda seed: torch.default_generator.manual_seed(seed),
        why="the RNG tracker seeds lazily, which never happens: no crash, but every "
        "tensor-parallel rank draws the same dropout",
        how="seeds the CPU generator",
        until=_UNTIL,
    )


def redirect_megatron() -> None:
    """Imports megatron.core and gives its RNG tracker the CPU generator."""
    with applied_during(
        "torch:compile",
        lambda original: _uncompiled,
        why="each jit_fuser of megatron-core imports the inductor, more than a second per "
        "process, and compiles C++ for seconds when it is first called",
        how="leaves functions as they are while megatron.core is imported",
        until="megatron-core compiles when called, not when imported",
    ):
        importlib.import_module("megatron.core.models.gpt")
    module = "megatron.core.tensor_parallel.random"
    apply(
        f"{module}:_get_cuda_rng_state",
        lambda original: lambda *args, **kwargs: torch.get_rng_state(),
        why="the RNG tracker saves its state on leaving a fork; raises without CUDA",
        how="reads the CPU generator",
        until=_UNTIL,
    )
    apply(
        f"{module}:_set_cuda_rng_state",
        lambda original: lambda new_state, *args, **kwargs: torch.set_rng_state(new_state),
        why="sets a CUDA generator lazily, which never happens: no crash, but a fork does not "
        "change the generator and recomputation draws another dropout",
        how="sets the CPU generator",
        until=_UNTIL,
    )
    logging.getLogger(module).addFilter(_is_no_generator_note)
    apply(
        "megatron.core.optimizer.clip_grads:l2_norm_impl",
        lambda original: _l2_norm,
        why="torch.norm adds a whole tensor up in fp32, one number after the other: on the CPU "
        "the norm of 136 million numbers is up to 1% too small, and less so where tensor "
        "parallelism has cut it, so that clipping depends on the layout",
        how="takes the norms of blocks, and then theirs in fp64",
        until="torch.norm on the CPU adds up in blocks, as torch.sum does",
    )


def _is_no_generator_note(record: logging.LogRecord) -> bool:
    # said in each fork that draws: here the generator of the fork is the CPU's
    return not record.getMessage().startswith("CPU RNG state changed")


def _l2_norm(
    chunk_size: int, overflow: Any, tensor_lists: list[list[torch.Tensor]], *_: Any
) -> tuple[torch.Tensor, None]:
    """apex's multi_tensor_l2norm: `[1]` of all tensors together, and no norms of each."""
    norms = [_block_norms(tensor) for tensors in tensor_lists for tensor in tensors]
    return torch.linalg.vector_norm(torch.cat(norms), dtype=torch.float64).float().view(1), None


def _block_norms(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    whole = flat.numel() // _BLOCK * _BLOCK
    blocks, rest = flat[:whole].view(-1, _BLOCK), flat[whole:].view(1, -1)
    return torch.cat([torch.linalg.vector_norm(part.float(), dim=1) for part in (blocks, rest)])


def cuda_type_name(original: Any) -> Any:
    """`Tensor.type` that answers torch.cuda.* where megatron-core compares the name."""

    @functools.wraps(original)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        if args or kwargs or not isinstance(answer, str):
            return answer
        return f"torch.cuda.{answer.rsplit('.', 1)[-1]}"

    return type_


def _uncompiled(model: Any = None, **_: Any) -> Any:
    """torch.compile as a plain decorator, with or without arguments."""
    return (lambda function: function) if model is None else model


def _on_cpu(original: Any) -> Any:
    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = _CPU
        return original(*args, **kwargs)

    return factory
