"""Checks that go wrong in every way the harness has to report."""

from __future__ import annotations

import time

from distributed.harness import Checks, Run, main

CHECKS = Checks()


@CHECKS.add(world_size=2)
def all_is_well(run: Run) -> str:
    return f"seen by rank {run.runtime.rank}"


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
    time.sleep(600)


if __name__ == "__main__":
    main(CHECKS)
