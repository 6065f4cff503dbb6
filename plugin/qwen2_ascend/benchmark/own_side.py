"""What the benchmarks measure of this project: it trains, and saves and loads what it trained.

It is imported when the runtime has started.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qwen2_ascend.benchmark.work import State, Trainer, optimized
from qwen2_ascend.checkpoint.load import load_checkpoint_weights
from qwen2_ascend.runtime import Runtime
from qwen2_ascend.training.checkpointing import megatron_checkpointer, resume
from qwen2_ascend.training.optimizer import num_updates
from qwen2_ascend.training.plan import RunPlan, make_plan
from qwen2_ascend.training.pretrain import prepare
from qwen2_ascend.training.saved_run import SavedRun
from qwen2_ascend.training.setup import checkpoint_identity

STEP_SECONDS = 2.0
"""Forward and backward between an asynchronous save and the update that waits for its copy: by
arithmetic 800 tokens of the benchmark's small model, on a core of 114 GFLOP/s."""


def trainer(plan: RunPlan, runtime: Runtime) -> Trainer:
    """The run of a plan."""
    run = prepare(plan, runtime)
    batches = run.batches()
    return Trainer(
        step=lambda: run.step(batches).loss,
        runtime=run.runtime,
        model=run.chunks[0],
        optimizer=run.optimizer,
    )


def state(
    plan: RunPlan, runtime: Runtime, *, ckpt_format: str = "torch_dist", is_async: bool = False
) -> State:
    """The run of a plan, one step on, and its checkpoint in one of the formats."""
    run = prepare(plan, runtime)
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

    return State(save=save, load=load, tensors=lambda: optimized(run.optimizer, run.chunks[0]))


def _compute(seconds: float) -> None:
    """Matrix products on this thread, as a step makes before its update."""
    end, matrix = time.perf_counter() + seconds, torch.ones(512, 512)
    while time.perf_counter() < end:
        torch.mm(matrix, matrix)
