"""One side of the checkpoint benchmark: has a training state, saves and loads it when asked to."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from qwen2_ascend import machine
from qwen2_ascend.benchmark.device import started_runtime
from qwen2_ascend.benchmark.train_side import own_plan
from qwen2_ascend.benchmark.work import State, Work
from qwen2_ascend.training.start import start_runtime

OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours-async": {"is_async": True},
    "ours-torch": {"ckpt_format": "torch"},
}
"""How this project's sides differ."""


def prepare(side: str, folder: str, dtype: str) -> Callable[[tuple[str, str]], dict[str, Any]]:
    """What answers ["save" or "load", folder]."""
    processes = machine.world_size()
    work = Work(
        side=side,
        folder=folder,
        device="cpu",
        dtype=dtype,
        seq_length=16,
        micro_batch_size=1,
        global_batch_size=processes,
        max_steps=1,
        use_distributed_optimizer=processes > 1,
    )
    return partial(_answer, _state_of(work))


def _state_of(work: Work) -> State:
    """A side's state. What needs megatron-core comes when the runtime has started."""
    if work.side == "torch.save":
        from qwen2_ascend.benchmark.transformers_side import state

        return state(work, started_runtime(work.device))
    if work.side == "dist_checkpointing":
        runtime = started_runtime(work.device, for_megatron=True)
        from qwen2_ascend.benchmark.megatron_side import state

        return state(work, runtime)
    plan = own_plan(work)
    runtime = start_runtime(plan)
    from qwen2_ascend.benchmark.own_side import state

    return state(plan, runtime, **OURS[work.side])


def _answer(state: State, question: tuple[str, str]) -> dict[str, Any]:
    action, folder = question[0], Path(question[1])
    before = _digest(state)
    begun = time.perf_counter()
    if action == "save":
        counted = state.save(folder)
        _on_disk(folder)
        seconds = time.perf_counter() - begun if counted is None else counted
        num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return {"seconds": seconds, "num_bytes": num_bytes}
    for tensor in state.tensors():
        tensor.zero_()
    begun = time.perf_counter()
    state.load(folder)
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "intact": _digest(state) == before}


def _on_disk(folder: Path) -> None:
    """Waits until all files are there; those that already are cost nothing."""
    for path in folder.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _digest(state: State) -> str:
    digest = hashlib.blake2b()
    for tensor in state.tensors():
        digest.update(tensor.detach().float().contiguous().numpy())
    return digest.hexdigest()
