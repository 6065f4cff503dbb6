"""torch_npu's genuine ProcessGroupHCCL between simulated cards: every collective against gloo."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.parametrize(
    "ranks",
    [pytest.param(cards, marks=pytest.mark.simulated(cards=cards)) for cards in (2, 4)],
    indirect=True,
)

DTYPES = ["float32", "bfloat16", "float16", "int64", "int32", "int8", "uint8"]
REDUCTION_TOLERANCE = {"float32": 1e-6, "bfloat16": 6e-2, "float16": 6e-3}
"""gloo reduces in another order, and 16-bit numbers in 16 bits; integers must be equal."""
SIZE = 1000
SEVERAL_SLOTS = 5_000_001
"""More elements than a slot or a ring of the shared memory holds."""


def values(dtype, rank, size=SIZE, seed=0):
    """What `rank` has; every rank can say what any other has."""
    import torch

    dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(100 * seed + rank)
    if dtype.is_floating_point:
        return torch.randn(size, generator=generator).to(dtype)
    return torch.randint(0, 20, (size,), generator=generator).to(dtype)


def empty(dtype, size=SIZE):
    """Memory to receive into: poison until then."""
    import torch

    return torch.empty(size, dtype=getattr(torch, dtype), device="npu")


def assert_equal(found, expected):
    import torch

    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0)


def assert_reduced(found, expected, dtype="float32", tolerance=None):
    import torch

    tolerance = tolerance or REDUCTION_TOLERANCE.get(dtype, 0)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=tolerance)


def gloo_sum(x, ranks, op="SUM"):
    """The all-reduced copy of a CPU tensor."""
    import torch.distributed as dist

    x = x.clone()
    dist.all_reduce(x, getattr(dist.ReduceOp, op), group=ranks.gloo)
    return x


# --- every collective, every dtype ----------------------------------------------------------------


@pytest.mark.parametrize("op", ["SUM", "MAX", "MIN"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_reduce(ranks, dtype, op):
    import torch.distributed as dist

    mine = values(dtype, ranks.rank)
    found = mine.npu()
    dist.all_reduce(found, getattr(dist.ReduceOp, op))
    assert_reduced(found, gloo_sum(mine, ranks, op), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_gather_into_tensor(ranks, dtype):
    import torch
    import torch.distributed as dist

    found = empty(dtype, ranks.size * SIZE)
    dist.all_gather_into_tensor(found, values(dtype, ranks.rank).npu())
    assert_equal(found, torch.cat([values(dtype, rank) for rank in range(ranks.size)]))


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "uint8"])
def test_reduce_scatter_tensor(ranks, dtype):
    import torch.distributed as dist

    mine = values(dtype, ranks.rank, ranks.size * SIZE)
    found = empty(dtype)
    dist.reduce_scatter_tensor(found, mine.npu())
    assert_reduced(found, gloo_sum(mine, ranks).chunk(ranks.size)[ranks.rank], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_broadcast(ranks, dtype):
    import torch.distributed as dist

    found = values(dtype, ranks.rank).npu()
    dist.broadcast(found, src=ranks.size - 1)
    assert_equal(found, values(dtype, ranks.size - 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_send_and_receive_around_the_ring(ranks, dtype):
    import torch.distributed as dist

    found, mine = empty(dtype), values(dtype, ranks.rank).npu()
    if ranks.rank == 0:
        dist.send(mine, ranks.next)
        dist.recv(found, ranks.previous)
    else:
        dist.recv(found, ranks.previous)
        dist.send(mine, ranks.next)
    assert_equal(found, values(dtype, ranks.previous))


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_to_all_single(ranks, dtype):
    import torch
    import torch.distributed as dist

    size = ranks.size * SIZE
    found = empty(dtype, size)
    dist.all_to_all_single(found, values(dtype, ranks.rank, size).npu())
    sent = [values(dtype, rank, size).chunk(ranks.size)[ranks.rank] for rank in range(ranks.size)]
    assert_equal(found, torch.cat(sent))


# --- the other reductions, and what HCCL does not reduce ------------------------------------------


def test_averages(ranks):
    import torch.distributed as dist

    mine = values("float32", ranks.rank, ranks.size * SIZE)
    found, share = mine.npu(), empty("float32")
    dist.all_reduce(found, dist.ReduceOp.AVG)
    dist.reduce_scatter_tensor(share, mine.npu(), dist.ReduceOp.AVG)
    expected = gloo_sum(mine, ranks) / ranks.size
    assert_reduced(found, expected)
    assert_reduced(share, expected.chunk(ranks.size)[ranks.rank])


def test_product(ranks):
    import torch.distributed as dist

    mine = values("float32", ranks.rank)
    found = mine.npu()
    dist.all_reduce(found, dist.ReduceOp.PRODUCT)
    assert_reduced(found, gloo_sum(mine, ranks, "PRODUCT"), tolerance=1e-5)


def test_bool_all_reduce(ranks):
    import torch
    import torch.distributed as dist

    found = torch.tensor([ranks.rank == 0, False, True]).npu()
    dist.all_reduce(found, dist.ReduceOp.MAX)
    assert_equal(found, torch.tensor([True, False, True]))


def test_dtypes_that_hccl_does_not_reduce_are_refused(ranks):
    """torch_npu's own host code does it, before anything reaches the simulated HCCL."""
    import torch.distributed as dist

    with pytest.raises(RuntimeError, match="Unsupported data type"):
        dist.all_reduce(values("float64", ranks.rank).npu())
    with pytest.raises(RuntimeError, match="Unsupported data type"):
        dist.reduce_scatter_tensor(empty("uint8"), empty("uint8", ranks.size * SIZE))


def test_float64_is_moved_though(ranks):
    import torch
    import torch.distributed as dist

    found, gathered = values("float64", ranks.rank).npu(), empty("float64", ranks.size * SIZE)
    dist.all_gather_into_tensor(gathered, found)
    dist.broadcast(found, 0)
    assert_equal(found, values("float64", 0))
    assert_equal(gathered, torch.cat([values("float64", r) for r in range(ranks.size)]))


def test_reduce_scatter_gather_to_and_from_one_rank(ranks):
    import torch.distributed as dist

    mine, everybody = values("float32", ranks.rank), range(ranks.size)
    total = mine.npu()
    dist.reduce(total, 0)
    expected = gloo_sum(mine, ranks)
    first = ranks.rank == 0
    gathered = [empty("float32") for _ in everybody] if first else None
    dist.gather(mine.npu(), gathered, dst=0)
    scattered = empty("float32")
    pieces = [values("float32", 0, seed=rank).npu() for rank in everybody] if first else None
    dist.scatter(scattered, pieces, src=0)
    assert_equal(scattered, values("float32", 0, seed=ranks.rank))
    if first:
        assert_reduced(total, expected)
        for rank, found in enumerate(gathered):
            assert_equal(found, values("float32", rank))


# --- sizes ----------------------------------------------------------------------------------------


def test_all_reduce_of_more_than_a_slot(ranks):
    import torch.distributed as dist

    mine = values("float32", ranks.rank, SEVERAL_SLOTS)
    found = mine.npu()
    dist.all_reduce(found)
    assert_reduced(found, gloo_sum(mine, ranks), tolerance=1e-5)


def test_message_of_more_than_a_ring(ranks):
    import torch.distributed as dist

    last = ranks.size - 1
    if ranks.rank == 0:
        dist.send(values("float32", 0, SEVERAL_SLOTS).npu(), last)
    elif ranks.rank == last:
        found = empty("float32", SEVERAL_SLOTS)
        dist.recv(found, 0)
        assert_equal(found, values("float32", 0, SEVERAL_SLOTS))


def test_lists(ranks):
    import torch
    import torch.distributed as dist

    everybody = range(ranks.size)
    mine = values("float32", ranks.rank, ranks.size * SIZE)
    pieces = [piece.contiguous() for piece in mine.npu().chunk(ranks.size)]
    gathered = [empty("float32") for _ in everybody]
    dist.all_gather(gathered, values("float32", ranks.rank).npu())
    for rank in everybody:
        assert_equal(gathered[rank], values("float32", rank))
    share = empty("float32")
    dist.reduce_scatter(share, pieces)
    assert_reduced(share, gloo_sum(mine, ranks).chunk(ranks.size)[ranks.rank])
    exchanged = [empty("float32") for _ in everybody]
    dist.all_to_all(exchanged, pieces)
    sent = [values("float32", rank, ranks.size * SIZE) for rank in everybody]
    expected = torch.cat([x.chunk(ranks.size)[ranks.rank] for x in sent])
    assert_equal(torch.cat([x.cpu() for x in exchanged]), expected)


def test_uneven_sizes(ranks):
    import torch
    import torch.distributed as dist

    everybody = range(ranks.size)
    gathered = [empty("float32", 10 + rank) for rank in everybody]
    dist.all_gather(gathered, values("float32", ranks.rank, 10 + ranks.rank).npu())
    for rank in everybody:
        assert_equal(gathered[rank], values("float32", rank, 10 + rank))
    sizes = [[source + 1 + target for target in everybody] for source in everybody]
    mine = values("float32", ranks.rank, sum(sizes[ranks.rank]))
    received = [row[ranks.rank] for row in sizes]
    found = empty("float32", sum(received))
    dist.all_to_all_single(found, mine.npu(), received, sizes[ranks.rank])
    sent = [values("float32", rank, sum(sizes[rank])).split(sizes[rank]) for rank in everybody]
    assert_equal(found, torch.cat([parts[ranks.rank] for parts in sent]))


# --- order in time --------------------------------------------------------------------------------


def test_several_collectives_at_once(ranks):
    import torch.distributed as dist

    mine = [values("float32", ranks.rank, 100_000, seed) for seed in range(5)]
    found = [x.npu() for x in mine]
    works = [dist.all_reduce(x, async_op=True) for x in found]
    for work in works:
        work.wait()
    for x, y in zip(found, mine, strict=True):
        assert_reduced(x, gloo_sum(y, ranks), tolerance=1e-5)


def test_a_value_read_before_wait_is_the_old_one(ranks):
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.ones(1, device="npu"))  # the first one waits: to join
    x, late = torch.ones(10, device="npu"), ranks.rank == 0
    if late:
        dist.barrier(group=ranks.gloo)  # the others have read
    work = dist.all_reduce(x, async_op=True)
    if not late:
        assert x[0].item() == 1
        assert not work.is_completed()
        dist.barrier(group=ranks.gloo)
    work.wait()
    assert x[0].item() == ranks.size


def test_memory_in_use_by_a_collective_is_not_given_to_others(ranks):
    import torch.distributed as dist

    mine = values("float32", ranks.rank, 300_000)
    x = mine.npu()
    doubled = x * 2
    work = dist.all_reduce(doubled, async_op=True)
    del x
    for _ in range(20):
        empty("float32", 300_000).fill_(7)
    work.wait()
    assert_reduced(doubled, gloo_sum(mine * 2, ranks), tolerance=1e-5)


def test_batched_messages_in_both_directions(ranks):
    import torch.distributed as dist

    size = 70_000
    forth, back = (values("float32", ranks.rank, size, seed).npu() for seed in (0, 1))
    from_previous, from_next = empty("float32", size), empty("float32", size)
    operations = [
        dist.P2POp(dist.isend, forth, ranks.next),
        dist.P2POp(dist.irecv, from_previous, ranks.previous),
        dist.P2POp(dist.isend, back, ranks.previous),
        dist.P2POp(dist.irecv, from_next, ranks.next),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    assert_equal(from_previous, values("float32", ranks.previous, size, 0))
    assert_equal(from_next, values("float32", ranks.next, size, 1))


@pytest.mark.parametrize("order", ["even ranks send first", "all send first"])
def test_pairs_exchange(ranks, order):
    import torch.distributed as dist

    peer = ranks.rank ^ 1
    mine, found = values("float32", ranks.rank).npu(), empty("float32")
    sends_first = order == "all send first" or ranks.rank % 2 == 0
    if sends_first:
        works = [dist.isend(mine, peer), dist.irecv(found, peer)]
    else:
        works = [dist.irecv(found, peer), dist.isend(mine, peer)]
    for work in works:
        work.wait()
    assert_equal(found, values("float32", peer))


# --- what training uses besides -------------------------------------------------------------------


def test_coalesced_all_reduces(ranks):
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _coalescing_manager

    mine = [values("float32", ranks.rank), values("float32", ranks.rank, 500, seed=3)]
    found = [x.npu() for x in mine]
    device = torch.device("npu", ranks.rank)
    with _coalescing_manager(device=device, async_ops=True) as manager:
        for x in found:
            dist.all_reduce(x)
    manager.wait()
    for x, y in zip(found, mine, strict=True):
        assert_reduced(x, gloo_sum(y, ranks))


def test_coalesced_reduce_scatters_and_all_gathers(ranks):
    """megatron-core's distributed optimizer issues them in this way."""
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _coalescing_manager

    sizes, device = (8, 16), torch.device("npu", ranks.rank)
    mine = [values("float32", ranks.rank, size * ranks.size, seed=size) for size in sizes]
    shares = [empty("float32", size) for size in sizes]
    with _coalescing_manager(dist.group.WORLD, device=device, async_ops=False):
        for share, x in zip(shares, mine, strict=True):
            dist.reduce_scatter_tensor(share, x.npu())
    gathered = [empty("float32", size * ranks.size) for size in sizes]
    with _coalescing_manager(dist.group.WORLD, device=device, async_ops=False):
        for whole, share in zip(gathered, shares, strict=True):
            dist.all_gather_into_tensor(whole, share)
    for share, whole, x in zip(shares, gathered, mine, strict=True):
        expected = gloo_sum(x, ranks)
        assert_reduced(share, expected.chunk(ranks.size)[ranks.rank])
        assert_reduced(whole, expected)


def test_groups_of_some_ranks(ranks):
    import torch
    import torch.distributed as dist

    from npusim.cards import TIMEOUT

    pairs = [
        dist.new_group([first, first + 1], timeout=TIMEOUT) for first in range(0, ranks.size, 2)
    ]
    found = torch.full((4,), float(ranks.rank)).npu()
    dist.all_reduce(found, group=pairs[ranks.rank // 2])
    assert_equal(found, torch.full((4,), float(ranks.rank // 2 * 4 + 1)))


def test_barriers_and_objects(ranks):
    import torch.distributed as dist

    dist.barrier(device_ids=[ranks.rank])
    gathered, chosen = [None] * ranks.size, [ranks.rank]
    dist.all_gather_object(gathered, {"rank": ranks.rank})
    dist.broadcast_object_list(chosen, 1)
    assert gathered == [{"rank": rank} for rank in range(ranks.size)]
    assert chosen == [1]


def test_distributed_data_parallel(ranks):
    import torch

    def gradient(device):
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 4).to(device)
        if device == "npu":
            model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[ranks.rank])
        model(values("float32", ranks.rank, 32).view(4, 8).to(device)).square().sum().backward()
        return next(model.parameters()).grad

    assert_reduced(gradient("npu"), gloo_sum(gradient("cpu"), ranks) / ranks.size, tolerance=1e-5)
