"""One side of the checkpoint benchmark: has a training state, saves and loads it when asked to."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from qwen2_ascend import machine
from qwen2_ascend.benchmark.sides import serve
from qwen2_ascend.benchmark.train_side import (
    Work,
    build_megatron_core,
    build_ours,
    build_transformers,
)
from qwen2_ascend.checkpoint.load import load_checkpoint_weights
from qwen2_ascend.runtime.megatron_compat import prepare_torch_dist
from qwen2_ascend.training.plan import make_plan
from qwen2_ascend.training.saved_run import SavedRun

STEP_SECONDS = 2.0
"""Forward and backward between an asynchronous save and the update that waits for its copy: by
arithmetic 800 tokens of the benchmark's small model, on a core of 114 GFLOP/s."""


@dataclass(frozen=True, kw_only=True)
class State:
    """What each side is reduced to."""

    save: Callable[[Path], float | None]
    """Saves into a new folder; returns the seconds that count, or None for all until what was
    written is on the disk."""
    load: Callable[[Path], None]
    tensors: Callable[[], list[Any]]
    """All that has to come back: weights and moments."""


def main(side: str, folder: str, dtype: str) -> None:
    """Serves the standard input, each line ["save" or "load", folder], until it ends."""
    serve(lambda: partial(_answer, _prepared(side, folder, dtype)))


def _prepared(side: str, folder: str, dtype: str) -> State:
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
    return BUILDERS[side](work)


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


def _ours(work: Work, *, ckpt_format: str = "torch_dist", is_async: bool = False) -> State:
    from qwen2_ascend.training.checkpointing import megatron_checkpointer, resume
    from qwen2_ascend.training.optimizer import num_updates
    from qwen2_ascend.training.setup import checkpoint_identity

    run, plan = build_ours(work)
    run.step(run.batches())
    assert num_updates(run.optimizer) == 1
    identity = checkpoint_identity(plan)
    kept: Any = replace(run.settings.checkpoint, ckpt_format=ckpt_format, async_save=is_async)
    run.settings = replace(run.settings, checkpoint=replace(kept, save=Path()))
    checkpointer = megatron_checkpointer(run, identity, lambda line: None)

    def save(folder: Path) -> float | None:
        checkpointer.move_to(folder)
        begun = time.perf_counter()
        checkpointer.save()
        waited = time.perf_counter() - begun
        if is_async:
            _compute(STEP_SECONDS)
            begun = time.perf_counter()
            checkpointer.wait_until_copied()
            waited += time.perf_counter() - begun
        checkpointer.finish()
        checkpointer.close()
        return waited if is_async else None

    def load(folder: Path) -> None:
        again = make_plan(replace(run.settings, model=replace(run.settings.model, load=folder)))
        assert again.source is not None and isinstance(again.saved, SavedRun)
        load_checkpoint_weights(
            run.chunks,
            again.source,
            identity.layout,
            padded_vocab_size=identity.padded_vocab_size,
            tp_rank=0,
            pp_stage=0,
        )
        resume(run, again.saved, identity, kept)

    return State(save=save, load=load, tensors=lambda: _optimized(run.optimizer, run.chunks[0]))


def _compute(seconds: float) -> None:
    """Matrix products on this thread, as a step makes before its update."""
    import torch

    end, matrix = time.perf_counter() + seconds, torch.ones(512, 512)
    while time.perf_counter() < end:
        torch.mm(matrix, matrix)


def _dist_checkpointing(work: Work) -> State:
    """megatron-core's own, as its documentation has it: sharded_state_dict, save, load.

    On several ranks they share the writing as Megatron-LM's --ckpt-fully-parallel-save has it.
    """
    import torch
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelSaveStrategyWrapper,
    )
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    made = build_megatron_core(work)
    made.step()
    prepare_torch_dist()

    is_ranked = work.use_distributed_optimizer
    group: Any = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {
        "distrib_optim_sharding_type": "dp_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": group,
    }
    keywords = {"metadata": metadata} if is_ranked else {}

    def sharded(*, is_loading: bool) -> dict[str, Any]:
        model = made.model.sharded_state_dict(**keywords)
        optimizer = made.optimizer.sharded_state_dict(model, is_loading=is_loading, **keywords)
        return {"model": model, "optimizer": optimizer}

    def save(folder: Path) -> None:
        if torch.distributed.get_rank() == 0:
            folder.mkdir()
        torch.distributed.barrier()
        strategy: Any = TorchDistSaveShardedStrategy("torch_dist", 1)
        if is_ranked:
            strategy = FullyParallelSaveStrategyWrapper(strategy, group)
        dist_checkpointing.save(sharded(is_loading=False), str(folder), strategy)

    def load(folder: Path) -> None:
        # its fully parallel loading broadcasts between devices only
        state: Any = dist_checkpointing.load(sharded(is_loading=True), str(folder))
        made.model.load_state_dict(state["model"])
        with torch.no_grad():
            made.optimizer.load_state_dict(state["optimizer"])

    return State(save=save, load=load, tensors=lambda: _optimized(made.optimizer, made.model))


def _torch_save(work: Work) -> State:
    import torch

    trainer = build_transformers(work)
    trainer.step()
    model, optimizer = trainer.model, trainer.optimizer

    def save(folder: Path) -> None:
        folder.mkdir()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, folder / "state.pt")

    def load(folder: Path) -> None:
        state = torch.load(folder / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    return State(save=save, load=load, tensors=lambda: [*_weights(model), *_moments(optimizer)])


def _optimized(optimizer: Any, model: Any) -> list[Any]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [*_weights(model), *(x for part in parts for x in _moments(part.optimizer))]


def _weights(model: Any) -> list[Any]:
    return [parameter.data for parameter in model.parameters()]


def _moments(optimizer: Any) -> list[Any]:
    """The moments of torch's AdamW, in the order of its parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [optimizer.state[p][name] for p in parameters for name in ("exp_avg", "exp_avg_sq")]


BUILDERS: dict[str, Callable[[Work], State]] = {
    "ours": _ours,
    "ours-async": partial(_ours, is_async=True),
    "ours-torch": partial(_ours, ckpt_format="torch"),
    "dist_checkpointing": _dist_checkpointing,
    "torch.save": _torch_save,
}

if __name__ == "__main__":
    main(*sys.argv[1:])
