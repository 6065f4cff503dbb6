"""Attention of ranks that share rows against the operator on whole rows; see harness.py.

Every rank knows the whole rows, and compares what it holds of the result and the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any
from unittest import mock

from distributed.harness import Checks, Run, main
from model.context_cases import (
    ALGORITHMS,
    HEADS,
    PACKINGS,
    SCALE,
    S,
    error,
    inputs,
    output_and_gradients,
    own,
    sent_bytes,
)

CHECKS = Checks()
RING, GATHER, ULYSSES = ALGORITHMS
LIMITS = {"float64": 1e-14, "float32": 4e-6, "bfloat16": 2e-2}
"""Limits of errors. The operator on whole rows has 1.0e-6 in fp32 and 5.8e-3 in bf16 against itself
in fp64; ranks that share rows were seen to have 2.5e-15, 1.3e-6 and 8.3e-3."""


@cache
def groups(cp: int) -> Any:
    """This rank's group of `cp` neighbours among 4."""
    import torch.distributed as dist

    found = [dist.new_group(range(first, first + cp)) for first in range(0, 4, cp)]
    return found[dist.get_rank() // cp]


def shared(algorithm: str, cp: int, **options: Any) -> tuple[Any, Any]:
    """`context_attention`, and a function that gives this rank's part of whole rows."""
    import torch.distributed as dist

    from qwen2_ascend.model.context_parallel import context_attention
    from qwen2_ascend.ops import get_ops

    options = {"ops": get_ops("torch"), **options}
    rank = dist.get_rank(groups(cp))
    return (
        partial(context_attention, algorithm=algorithm, group=groups(cp), **options),
        partial(own, cp=cp, rank=rank, algorithm=algorithm),
    )


def difference(
    algorithm: str,
    cp: int,
    dtype: Any,
    packing: str,
    heads: tuple[int, int, int] = HEADS,
    **options: Any,
) -> float:
    """The largest error of the result and the gradients on this rank."""
    from qwen2_ascend.ops import get_ops

    b, ends = PACKINGS[packing]
    attend, mine = shared(algorithm, cp, **options)
    *tensors, upstream = inputs(b, dtype, heads)
    exact = output_and_gradients(
        get_ops("torch").attention, [x.double() for x in tensors], upstream.double(), ends=ends
    )
    found = output_and_gradients(attend, map(mine, tensors), mine(upstream), ends=ends)
    assert found[0].is_contiguous()
    return max(error(one, mine(other)) for one, other in zip(found, exact, strict=True))


def compared(run: Run, algorithm: str, cp: int) -> str:
    import torch

    from qwen2_ascend.ops import get_ops

    worst = dict.fromkeys(LIMITS, 0.0)
    for dtype, limit in LIMITS.items():
        for plain in ((), ("attention",)):
            for packing in PACKINGS:
                options = {"ops": get_ops("torch", plain=plain)}
                found = difference(algorithm, cp, getattr(torch, dtype), packing, **options)
                assert found <= limit, (dtype, plain, packing, found)
                worst[dtype] = max(worst[dtype], found)
    return ", ".join(f"{dtype} {found:.1e}" for dtype, found in worst.items())


for algorithm in ALGORITHMS:
    for cp in (2, 4):
        name = f"{algorithm} of {cp}"
        CHECKS.case(name, 4, compared, algorithm=algorithm, cp=cp)


@CHECKS.add(world_size=4)
def heads_of_all_kinds(run: Run) -> None:
    """Among them fewer groups than ranks, and numbers that do not divide each other; Ulysses
    repeats their keys."""
    import torch

    for heads in ((4, 4, 8), (12, 2, 8), (4, 1, 8), (12, 6, 8), (12, 3, 8)):
        for algorithm in ALGORITHMS:
            found = difference(algorithm, 4, torch.float64, "two rows", heads)
            assert found <= LIMITS["float64"], (heads, algorithm, found)


@CHECKS.add(world_size=4)
def queries_in_several_bands(run: Run) -> None:
    """Attention by matrix products takes some queries at a time."""
    import torch

    from qwen2_ascend.ops import get_ops, unfused

    ops = get_ops("torch", plain=("attention",))
    with mock.patch.object(unfused, "QUERIES_AT_ONCE", 5):
        for packing in ("dense", "two rows"):
            for algorithm in (RING, GATHER):
                found = difference(algorithm, 2, torch.float64, packing, ops=ops)
                assert found <= LIMITS["float64"], (packing, algorithm, found)


# --- that the comparison sees mistakes ------------------------------------------------------------


@CHECKS.add(world_size=4)
def a_missing_piece_is_seen(run: Run) -> str:
    """Each rank leaves out one block of two rows, one of which is a single document."""
    import torch

    from qwen2_ascend.model import context_parallel, context_plan

    smallest = 1.0
    for algorithm, name in ((RING, "ring_launches"), (GATHER, "gathered_launches")):
        genuine = getattr(context_plan, name)
        for packing in ("dense", "two rows"):
            launches = genuine(S, 2, 4, run.runtime.rank, PACKINGS[packing][1])
            n = next(n for n in reversed(range(len(launches))) if launches[n])
            without = (*launches[:n], launches[n][1:], *launches[n + 1 :])
            with mock.patch.object(context_parallel, name, lambda *_, found=without: found):
                smallest = min(smallest, difference(algorithm, 4, torch.float32, packing))
    assert smallest > 100 * LIMITS["float32"], smallest
    return f"smallest error {smallest:.1e}"


@CHECKS.add(world_size=4)
def statistics_of_one_piece_alone_are_seen(run: Run) -> str:
    """Backward takes those of the whole sequence."""
    import torch

    from qwen2_ascend.ops import get_ops

    ops = get_ops("torch")
    genuine = ops.partial_attention

    def backward(d_context, q, k, v, context, lse, blocks, **options):
        for part in genuine.forward(q, k, v, blocks, softmax_scale=options["softmax_scale"]):
            rows, queries = (slice(x.start, x.stop) for x in (part.rows, part.queries))
            lse = lse.clone()
            lse[queries, rows] = part.lse
        genuine.backward(d_context, q, k, v, context, lse, blocks, **options)

    wrong = ops._replace(partial_attention=genuine._replace(backward=backward))
    found = difference(RING, 4, torch.float32, "dense", ops=wrong)
    assert found > 100 * LIMITS["float32"], found
    return f"error {found:.1e}"


# --- what is sent, when, and kept -----------------------------------------------------------------


def bytes_of(log: Any) -> float:
    from qwen2_ascend.planning.traffic import sent_bytes

    return sum(sent_bytes(*call) * times for call, times in log.calls.items())


@CHECKS.add(world_size=4)
def bytes_sent(run: Run) -> None:
    """What torch.distributed is asked to send is what `sent_bytes` says."""
    import torch

    from planning.collective_log import CollectiveLog

    for algorithm in ALGORITHMS:
        for cp in (2, 4):
            for np_, ng, hn in (HEADS, (12, 2, 8)):
                attend, mine = shared(algorithm, cp)
                leaves = [
                    mine(x).requires_grad_() for x in inputs(2, torch.bfloat16, (np_, ng, hn))
                ]
                with CollectiveLog() as forward:
                    result = attend(*leaves[:3], softmax_scale=SCALE)
                with CollectiveLog() as backward:
                    result.backward(mine(leaves[3].new_ones(S, 2, np_ * hn)))
                found = tuple(map(bytes_of, (forward, backward)))
                sizes = {"tokens": S // cp * 2, "np": np_, "ng": ng, "hn": hn, "element": 2}
                expected = sent_bytes(algorithm, cp, **sizes)
                assert found == expected, (algorithm, cp, found, expected)


class Events(list):
    """What is started, computed and waited for, in order."""

    def start(self, operations: list[Any]) -> list[Any]:
        """Stands in for torch.distributed.batch_isend_irecv."""
        name = ("keys", "gradients")[operations[0].tag]
        self.append(f"start {name}")
        works = self._genuine(operations)

        def wait() -> None:
            self.append(f"wait {name}")
            for work in works:
                work.wait()

        return [mock.Mock(wait=wait)]

    def watched_ops(self) -> Any:
        """torch's operators; those on parts of attention say when they are called."""
        from qwen2_ascend.ops import get_ops

        ops = get_ops("torch")
        forward, backward = map(self._computing, ops.partial_attention[:2])
        return ops._replace(
            partial_attention=ops.partial_attention._replace(forward=forward, backward=backward)
        )

    def _computing(self, function: Any) -> Any:

        def call(*args: Any, **options: Any) -> Any:
            self.append("compute")
            return function(*args, **options)

        return call

    @contextmanager
    def recorded(self) -> Iterator[None]:
        import torch.distributed as dist

        self._genuine = dist.batch_isend_irecv
        with mock.patch.object(dist, "batch_isend_irecv", self.start):
            yield


@CHECKS.add(world_size=4)
def the_next_block_is_under_way_while_one_is_computed(run: Run) -> None:
    import torch

    events = Events()
    attend, mine = shared(RING, 4, ops=events.watched_ops())
    *leaves, upstream = (mine(x).requires_grad_() for x in inputs(2, torch.float32))
    with events.recorded():
        result = attend(*leaves, softmax_scale=SCALE)
        block = ["start keys", "compute", "wait keys"]
        assert events == [*block * 3, "compute"], events
        events.clear()
        result.backward(upstream)
    assert events == [
        *("start keys", "compute", "wait keys"),
        *("start keys", "compute", "start gradients", "wait keys"),
        *("start keys", "compute", "wait gradients", "start gradients", "wait keys"),
        *("compute", "wait gradients", "start gradients", "wait gradients"),
    ], events


@CHECKS.add(world_size=4)
def blocks_without_work_are_not_computed(run: Run) -> None:
    """Where every chunk is a document of its own, only the first step of the ring has work."""
    import torch

    events = Events()
    off = difference(RING, 4, torch.float32, "chunk by chunk", ops=events.watched_ops())
    assert off <= LIMITS["float32"]
    assert events == ["compute"] * 2, events


@CHECKS.add(world_size=4)
def kept_for_backward(run: Run) -> None:
    """This rank's q, k, v, result and log-sum-exp, and nothing of other ranks'."""
    import torch

    np_, ng, hn = HEADS
    for algorithm in ALGORITHMS:
        for cp in (2, 4):
            attend, mine = shared(algorithm, cp)
            leaves = [mine(x).requires_grad_() for x in inputs(2, torch.bfloat16)[:3]]
            kept: dict[int, int] = {}

            def pack(x: Any, kept: dict[int, int] = kept) -> Any:
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                result = attend(*leaves, softmax_scale=SCALE)
            del result
            expected = 2 * S // cp * ((2 * np_ + 2 * ng) * hn * 2 + np_ * 4)
            assert sum(kept.values()) == expected, (algorithm, cp, kept, expected)


# --- together with others -------------------------------------------------------------------------


def through(algorithm: str, wrapped: Any) -> list[list[Any]]:
    """What attention gives by itself, and as `wrapped(attend)`."""
    import torch

    attend, mine = shared(algorithm, 4)
    b, ends = PACKINGS["two rows"]
    *tensors, upstream = map(mine, inputs(b, torch.bfloat16))
    return [
        output_and_gradients(function, tensors, upstream, ends=ends)
        for function in (attend, wrapped(attend))
    ]


def same(one: list[Any], other: list[Any]) -> bool:
    import torch

    return all(map(torch.equal, one, other))


@CHECKS.add(world_size=4)
def recomputed(run: Run) -> None:
    from megatron.core import tensor_parallel

    def wrapped(attend: Any) -> Any:
        return lambda *x, **options: tensor_parallel.checkpoint(
            partial(attend, **options), False, *x
        )

    for algorithm in ALGORITHMS:
        assert same(*through(algorithm, wrapped)), algorithm


@CHECKS.add(world_size=4)
def swapped(run: Run) -> None:
    """--swap-attention."""
    import torch

    from qwen2_ascend.model.swap import AttentionSwap

    swap = AttentionSwap(torch.device("cpu"))

    def wrapped(attend: Any) -> Any:
        def call(*x: Any, **options: Any) -> Any:
            with swap.keeping_outside():
                return attend(*x, **options)

        return call

    for algorithm in ALGORITHMS:
        assert same(*through(algorithm, wrapped)), algorithm


@CHECKS.add(world_size=4)
def without_gradients(run: Run) -> None:
    import torch

    for algorithm in ALGORITHMS:
        attend, mine = shared(algorithm, 4)
        tensors = [mine(x) for x in inputs(2, torch.float32)[:3]]
        with torch.no_grad():
            found = attend(*tensors, softmax_scale=SCALE)
        expected = attend(*(x.requires_grad_() for x in tensors), softmax_scale=SCALE)
        assert torch.equal(found, expected), algorithm


@CHECKS.add(world_size=4)
def an_upstream_gradient_of_odd_strides(run: Run) -> None:
    """A sum's gradient is one number in the memory of all; the other one is transposed."""
    import torch

    for algorithm in ALGORITHMS:
        attend, mine = shared(algorithm, 4)
        *tensors, upstream = map(mine, inputs(2, torch.float64))
        ones = torch.ones_like(upstream)
        expected = output_and_gradients(attend, tensors, ones)
        found = output_and_gradients(attend, tensors, ones.new_ones(()).expand(ones.shape))
        assert same(expected, found), algorithm
        expected = output_and_gradients(attend, tensors, upstream)
        transposed = upstream.transpose(0, 2).contiguous().transpose(0, 2)
        assert same(expected, output_and_gradients(attend, tensors, transposed)), algorithm


@CHECKS.add(world_size=4)
def mistakes(run: Run) -> None:
    """Arguments that contradict each other are refused before anything is sent."""
    import pytest
    import torch

    q, k, v = (torch.zeros(6, 1, heads, 4) for heads in (4, 2, 2))
    for algorithm in (RING, GATHER):
        attend, _ = shared(algorithm, 4)
        for wrong, options, message in (
            ((q, k[:4], v), {}, r"q \[6, 1, 4, 4\], k \[4, 1, 2, 4\]"),
            ((q, k, v.double()), {}, "v torch.float64"),
            ((q[:5], k[:5], v[:5]), {}, "5 tokens of a row are not two equal chunks"),
            ((q, k, v), {"ends": (6,)}, r"ends=\(6\) do not divide 1 row\(s\) of 24 tokens"),
        ):
            with pytest.raises(ValueError, match=message):
                attend(*wrong, softmax_scale=SCALE, **options)


@CHECKS.add(world_size=4)
def dropout(run: Run) -> None:
    """Ulysses drops weights as the operator does; the others refuse."""
    import pytest
    import torch

    torch.manual_seed(run.runtime.rank)
    q, k, v, _ = inputs(2, torch.float32)
    attend, mine = shared(ULYSSES, 4)
    found = attend(*map(mine, (q, k, torch.ones_like(v))), softmax_scale=SCALE, dropout_p=0.25)
    assert found.std() > 0.1 and abs(found.mean() - 1) < 0.1, (found.std(), found.mean())
    for algorithm in (RING, GATHER):
        attend, mine = shared(algorithm, 4)
        with pytest.raises(ValueError, match=r"attention dropout 0\.25 with .*: use ulysses"):
            attend(*map(mine, (q, k, v)), softmax_scale=SCALE, dropout_p=0.25)


if __name__ == "__main__":
    main(CHECKS)
