"""Checks that go wrong in every way the harness has to report."""

from __future__ import annotations

import os
import subprocess
import sys
import time

FOUND = {"torch", "megatron.core", "transformers.models.qwen2.modeling_qwen2"} & set(sys.modules)
HASH_OF_A_WORD = hash("word")

from distributed.harness import Checks, Run, main  # noqa: E402 - FOUND comes first

CHECKS = Checks()


@CHECKS.add(world_size=2)
def all_is_well(run: Run) -> str:
    assert __name__ == "__main__" and sys.modules["__main__"].CHECKS is CHECKS
    assert len(FOUND) == 3, f"only {FOUND} was there from the start"
    return f"seen by rank {run.runtime.rank}"


@CHECKS.add(world_size=2)
def ranks_are_processes_of_their_own(run: Run) -> None:
    import numpy
    import torch

    own = (os.getsid(0), HASH_OF_A_WORD, numpy.random.random())
    all_of_them: list = [None, None]
    torch.distributed.all_gather_object(all_of_them, own)
    assert own[0] == os.getpid() and os.environ["OMP_NUM_THREADS"] == "1"
    for one, other in zip(*all_of_them, strict=True):
        assert one != other, all_of_them


@CHECKS.add(world_size=2)
def one_rank_fails(run: Run) -> None:
    assert run.runtime.rank == 0, "only rank 0 is right"


@CHECKS.add(world_size=2)
def it_goes_on_after_that(run: Run) -> None:
    import torch

    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    assert total == 2


@CHECKS.add(world_size=2)
def one_rank_hangs(run: Run) -> None:
    if run.runtime.rank == 1:
        time.sleep(600)


@CHECKS.add(world_size=2)
def never_reached(run: Run) -> None: ...


@CHECKS.add(world_size=1)
def everything_hangs(run: Run) -> None:
    """It and a process that left its session; their ids are in `processes`."""
    sleeper = subprocess.Popen(["sleep", "600"], start_new_session=True)
    (run.folder / "processes").write_text(f"{os.getpid()} {sleeper.pid}")
    sleeper.wait()


@CHECKS.add(world_size=3)
def one_rank_is_gone(run: Run) -> None:
    if run.runtime.rank == 2:
        print("the last words of rank 2", flush=True)
        os._exit(7)
    time.sleep(600)


@CHECKS.add(world_size=4)
def one_rank_is_killed(run: Run) -> None:
    if run.runtime.rank == 1:
        os.kill(os.getpid(), 9)
    time.sleep(600)


if __name__ == "__main__":
    main(CHECKS)
