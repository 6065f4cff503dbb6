"""Ranks agree on a plan, or end together with what is not the same on them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from distributed.harness import Checks, Run, main
from helpers import make_tiny_hugging_face_folder, tiny_config

if TYPE_CHECKING:
    from qwen2_ascend.config import Qwen2Config
    from qwen2_ascend.training.plan import RunPlan

CHECKS = Checks()
FLAGS = "--mock-data --seq-length 8 --train-iters 2 --lr 1e-3"


@CHECKS.add(world_size=2)
def copies_at_other_places_with_other_times_are_the_same_plan(run: Run) -> str:
    own = node_copy(run, "copies")
    if run.runtime.rank == 1:
        os.utime(own / "model.safetensors", (10**9, 10**9))
    plan = plan_of(f"--load {own} --num-workers {run.runtime.rank}")
    assert plan.base == own, "each rank reads its own copy"
    return str(plan.length)


@CHECKS.add(world_size=2)
def other_flags_end_all_ranks(run: Run) -> str:
    own = node_copy(run, "flags")
    lr = ("1e-3", "2e-3")[run.runtime.rank]
    told = refused(f"--load {own} --lr {lr}")
    assert "rank 1" in told and "--lr: 0.002, and 0.001 on rank 0" in told, told
    return told


@CHECKS.add(world_size=2)
def another_model_ends_all_ranks(run: Run) -> str:
    own = node_copy(run, "models", other=tiny_config(ffn_hidden_size=64))
    told = refused(f"--load {own}")
    assert "the model's config: " in told and "the weights: " in told, told
    return told


@CHECKS.add(world_size=2)
def a_model_that_one_node_lacks_ends_all_ranks(run: Run) -> str:
    own = node_copy(run, "missing")
    if run.runtime.rank == 1:
        shutil.rmtree(own)
    told = refused(f"--load {own}")
    assert "rank 1" in told and "no such folder" in told, told
    return told


@CHECKS.add(world_size=2)
def rank_0_says_which_iteration_is_resumed(run: Run) -> str:
    """The other rank's copy has a later one that rank 0 does not know of."""
    from distributed.train_worker import save, start, steps

    model = node_copy(run, "model")
    saved = run.folder / "saved"
    training = start(run, f"{FLAGS} --global-batch-size 2 --save {saved}", load=model)
    for _ in range(2):
        steps(training, 1)
        save(training)
    own = run.folder / f"node{run.runtime.rank}-saved"
    shutil.copytree(saved, own)
    if run.runtime.rank == 0:
        (own / "latest_checkpointed_iteration.txt").write_text("1")
    plan = plan_of(f"--load {own} --global-batch-size 2")
    assert plan.made() == {"iteration": 1, "consumed_samples": 2}
    assert plan.source is not None and plan.source.folder == own / "iter_0000001"
    return str(plan.found)


def plan_of(flags: str) -> RunPlan:
    """The plan that rank 0 makes and all agree on, as in the launcher."""
    from functools import partial

    from qwen2_ascend.machine import rank
    from qwen2_ascend.training.plan import make_plan
    from qwen2_ascend.training.settings import parse
    from qwen2_ascend.training.start import broadcast_plan

    settings = parse(f"{FLAGS} {flags}".split())
    own = make_plan(settings) if rank() == 0 else None
    return broadcast_plan(partial(make_plan, settings), own, timeout_seconds=60)


def refused(flags: str) -> str:
    from qwen2_ascend.errors import UserError

    with pytest.raises(UserError) as caught:
        plan_of(flags)
    return str(caught.value)


def node_copy(run: Run, name: str, other: Qwen2Config | None = None) -> Path:
    """This rank's own copy of a model; with `other`, rank 1 has another one."""
    import torch

    folders = [run.folder / f"node{rank}-{name}" for rank in range(2)]
    if run.runtime.rank == 0:  # transformers writes nothing on other ranks
        for folder, config in zip(folders, (tiny_config(), other or tiny_config()), strict=True):
            make_tiny_hugging_face_folder(folder, config)
    torch.distributed.barrier()
    return folders[run.runtime.rank]


if __name__ == "__main__":
    main(CHECKS)
