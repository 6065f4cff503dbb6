"""Attention of ranks that share rows against the operator on whole rows; see distributed/harness.py.

Every rank knows the whole rows, and compares what it holds of the result and the gradients.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

from distributed.harness import Checks, Run, main
from model.context_cases import ALGORITHMS, PACKINGS, error, inputs, output_and_gradients, own

CHECKS = Checks()


@cache
def groups(cp: int) -> Any:
    """This rank's group of `cp` neighbours among 4."""
    import torch.distributed as dist

    found = [dist.new_group(range(first, first + cp)) for first in range(0, 4, cp)]
    return found[dist.get_rank() // cp]


def difference(algorithm: str, cp: int, dtype: Any, packing: str, ops: Any, **options: Any) -> Any:
    """The largest error of the result and each gradient on this rank."""
    import torch.distributed as dist

    from qwen2_ascend.model.context_parallel import context_attention
    from qwen2_ascend.ops import get_ops

    group = groups(cp)
    rank = dist.get_rank(group)
    b, ends = PACKINGS[packing]
    *tensors, upstream = inputs(b, dtype, **options)
    exact = output_and_gradients(
        get_ops("torch").attention, [x.double() for x in tensors], upstream.double(), ends=ends
    )
    attend = partial(context_attention, algorithm=algorithm, group=group, ops=ops)
    mine = partial(own, cp=cp, rank=rank, algorithm=algorithm)
    found = output_and_gradients(attend, map(mine, tensors), mine(upstream), ends=ends)
    return [error(one, mine(other)) for one, other in zip(found, exact, strict=True)]


def compared(run: Run, algorithm: str, cp: int) -> str:
    import torch

    from qwen2_ascend.ops import get_ops

    found = []
    for dtype, limit in ((torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
        for plain in ((), ("attention",)):
            ops = get_ops("torch", plain=plain)
            for packing in PACKINGS:
                worst = max(difference(algorithm, cp, dtype, packing, ops))
                found.append((worst, limit, str(dtype), plain, packing))
                print("C", *found[-1], sep=",", flush=True)
    for one in found:
        assert one[0] <= one[1], one
    return ""


for algorithm in ALGORITHMS:
    for cp in (2, 4):
        CHECKS.add(world_size=4, name=f"{algorithm} of {cp}")(
            partial(compared, algorithm=algorithm, cp=cp)
        )

if __name__ == "__main__":
    main(CHECKS)
