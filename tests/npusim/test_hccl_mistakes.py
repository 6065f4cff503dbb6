"""Negative controls: what goes wrong between ranks is reported, and never gives numbers.

On a device most of these hang until HCCL's time-out, or finish with wrong values.
"""

from __future__ import annotations

import os

import pytest

pytestmark = pytest.mark.simulated(cards=2, alone="mistakes")


@pytest.fixture(scope="module")
def joined():
    """The two ranks. Nobody leaves: streams with an error never end."""
    from npusim.cards import join

    # else a thread of torch_npu ends the process some time after an error
    os.environ["HCCL_ASYNC_ERROR_HANDLING"] = "0"
    return join()


@pytest.fixture
def both(joined):
    """The two ranks in a new group, to be broken."""
    import dataclasses

    import torch.distributed as dist

    from npusim.cards import TIMEOUT

    return dataclasses.replace(joined, hccl=dist.new_group(timeout=TIMEOUT))


@pytest.fixture
def soon(monkeypatch):
    """Ranks wait two seconds for each other."""
    monkeypatch.setenv("HCCL_SIM_TIMEOUT", "2")


def assert_reported(call, capfd, message):
    """The call, or what waits for it, raises, and HCCL says why."""
    import torch

    with pytest.raises(RuntimeError):
        call()
        torch.npu.current_stream().synchronize()
    assert message in capfd.readouterr().err


def test_different_counts(both, capfd):
    import torch
    import torch.distributed as dist

    x = torch.ones(10 + both.rank, device="npu")
    assert_reported(
        lambda: dist.all_reduce(x, group=both.hccl), capfd, "MISMATCH: AllReduce(count=1"
    )


def test_different_dtypes(both, capfd):
    import torch
    import torch.distributed as dist

    x = torch.ones(10, dtype=(torch.float32, torch.bfloat16)[both.rank], device="npu")
    assert_reported(
        lambda: dist.all_reduce(x, group=both.hccl), capfd, "MISMATCH: AllReduce(count=10 dtype="
    )


def test_different_order(both, capfd):
    import torch
    import torch.distributed as dist

    x, y = torch.ones(10, device="npu"), torch.ones(20, device="npu")
    calls = [
        lambda: dist.all_reduce(x, group=both.hccl),
        lambda: dist.broadcast(y, 0, group=both.hccl),
    ]

    def in_own_order():
        for call in calls if both.rank == 0 else reversed(calls):
            call()

    assert_reported(in_own_order, capfd, "MISMATCH: ")


def test_different_roots(both, capfd):
    import torch
    import torch.distributed as dist

    x = torch.ones(10, device="npu")
    assert_reported(
        lambda: dist.broadcast(x, both.rank, group=both.hccl), capfd, "MISMATCH: Broadcast("
    )


def test_a_message_of_another_size(both, capfd):
    import torch
    import torch.distributed as dist

    x = torch.ones(10 + both.rank, device="npu")
    if both.rank == 0:
        dist.send(x, 1, group=both.hccl)  # buffered: the sender cannot know
    else:
        message = "MISMATCH: receive of 44 bytes, dtype 4, from rank 0, which sends 40 bytes"
        assert_reported(lambda: dist.recv(x, 0, group=both.hccl), capfd, message)


def test_uneven_parts_of_an_all_to_all(both, capfd):
    import torch
    import torch.distributed as dist

    x, received = torch.ones(6, device="npu"), torch.empty(6, device="npu")
    splits = [[3, 3], [2, 4]][both.rank]
    message = "MISMATCH: AlltoAll expects" if both.rank == 0 else ""
    assert_reported(
        lambda: dist.all_to_all_single(received, x, [3, 3], splits, group=both.hccl), capfd, message
    )


def test_a_rank_that_does_not_come(both, soon, capfd):
    import torch
    import torch.distributed as dist

    x = torch.ones(10, device="npu")
    dist.all_reduce(x, group=both.hccl)
    if both.rank == 0:
        assert_reported(
            lambda: dist.all_reduce(x, group=both.hccl), capfd, "time-out in a collective"
        )
    dist.barrier(group=both.gloo)


def test_a_missing_wait(both):
    """The value is read before the other rank has come: the old one."""
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.ones(1, device="npu"), group=both.hccl)  # the first one waits: to join
    x = torch.ones(10, device="npu")
    if both.rank == 1:
        dist.barrier(group=both.gloo)  # rank 0 has read
    work = dist.all_reduce(x, async_op=True, group=both.hccl)
    if both.rank == 0:
        assert x[0].item() == 1
        assert not work.is_completed()
        dist.barrier(group=both.gloo)
    work.wait()
    assert x[0].item() == 2


@pytest.mark.simulated(alone="death")
def test_a_rank_that_dies(capfd):
    """It is noticed at once, not after the time-out."""
    import torch
    import torch.distributed as dist

    from npusim.cards import join

    def one_all_reduce():
        join()
        x = torch.ones(10, device="npu")
        dist.all_reduce(x)
        return x

    if os.environ["RANK"] == "1":
        process = os.fork()  # the one to die; this one tells pytest that the test went well
        if process == 0:
            one_all_reduce()
            os._exit(0)
        os.waitpid(process, 0)
        return
    os.environ["HCCL_ASYNC_ERROR_HANDLING"] = "0"
    x = one_all_reduce()
    assert_reported(lambda: dist.all_reduce(x), capfd, "rank 1 is dead")
