"""Checks of agreement.py and meeting.py on three ranks, run by test_agreement.py."""

from __future__ import annotations

from distributed.harness import Checks, Run, main

CHECKS = Checks()


def faults_of(call) -> tuple[str, ...]:
    from qwen2_ascend.errors import UserError

    try:
        call()
    except UserError as error:
        return error.faults
    return ()


@CHECKS.add(world_size=3)
def rank_0_makes_it_for_all(run: Run) -> None:
    from qwen2_ascend.errors import UserError
    from qwen2_ascend.runtime import agreement

    made = []

    def make() -> tuple[str, int]:
        made.append(run.runtime.rank)
        return "plan", run.runtime.rank

    assert agreement.made_by_first(make) == ("plan", 0)
    assert made == [0] * (run.runtime.rank == 0)
    assert agreement.broadcast_from_first(run.runtime.rank) == 0

    def refuse() -> None:
        raise UserError(["one fault", "another"])

    assert faults_of(lambda: agreement.made_by_first(refuse)) == ("one fault", "another")


@CHECKS.add(world_size=3)
def who_differs_is_named_on_all_ranks(run: Run) -> None:
    from qwen2_ascend.runtime.agreement import require_equal

    rank = run.runtime.rank
    require_equal("a number", 7, note=f"of rank {rank}")
    (fault,) = faults_of(lambda: require_equal("the plan", rank == 2, note=f"as {rank}."))
    assert fault.startswith("the plan is not the same on all ranks: rank 0 on ")
    assert "has False (as 0); rank 2 on " in fault and "has True (as 2). Start every" in fault
    assert "rank 1" not in fault
    (fault,) = faults_of(lambda: require_equal("the plan", "x" * 1000 + str(rank)))
    assert fault.count("has sha256 ") == 3 and len(fault) < 400, fault


@CHECKS.add(world_size=3)
def a_fault_of_one_rank_ends_all(run: Run) -> None:
    from qwen2_ascend.runtime.agreement import raise_together

    rank = run.runtime.rank
    raise_together([])
    found = faults_of(lambda: raise_together(["all have it", *["two have it"] * (rank > 0)]))
    assert found[0] == "all have it" and len(found) == 2
    assert found[1].startswith("rank 1 on ") and found[1].endswith(": two have it")


@CHECKS.add(world_size=3)
def groups_without_a_time_out_take_that_of_the_run(run: Run) -> None:
    import torch
    from megatron.core import parallel_state

    from qwen2_ascend import runtime
    from qwen2_ascend.parallel import ParallelLayout

    runtime.initialize_model_parallel(ParallelLayout(tensor_model_parallel_size=3), 2)
    groups = [
        torch.distributed.group.WORLD,
        torch.distributed.new_group(),
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_data_parallel_group(),
    ]
    for group in groups:
        backend = group._get_backend(torch.device("cpu"))
        assert backend.options._timeout.total_seconds() == run.runtime.timeout_seconds


if __name__ == "__main__":
    main(CHECKS)
