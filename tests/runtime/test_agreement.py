"""How ranks meet and agree: ranks are threads here, and processes in the worker."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from distributed.harness import each_check
from qwen2_ascend.errors import UserError
from qwen2_ascend.runtime import agreement, meeting
from runtime.agreement_worker import CHECKS

WORKER = Path(__file__).with_name("agreement_worker.py")
test_agreement = each_check(WORKER, CHECKS)


def test_a_process_alone_agrees_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    try:
        assert agreement.broadcast_from_first(3) == 3
        agreement.require_equal("the plan", object())
        with pytest.raises(UserError, match="no such file"):
            agreement.raise_together(["no such file"])
    finally:
        meeting.leave()


def words(store: dist.Store, ranks: tuple[int, ...], seconds: float = 5) -> dict[int, str]:
    """What ranks of a start come to call it; each in a thread."""
    found: dict[int, str] = {}
    deadline = time.monotonic() + seconds

    def take_part(rank: int) -> None:
        part = meeting._answer if rank else meeting._call
        found[rank] = part(store, rank, len(ranks), deadline)

    threads = [threading.Thread(target=take_part, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 5)
    return found


def test_a_second_start_in_the_same_store_is_not_mistaken_for_the_first() -> None:
    """torchrun keeps its store over a restart; a rank may be there long before rank 0 is."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=5))
    first = words(store, (0, 1, 2))
    assert len(set(first.values())) == 1 and len(first) == 3
    second: dict[int, str] = {}
    deadline = time.monotonic() + 10
    early = [
        threading.Thread(
            target=lambda rank=rank: second.update(
                {rank: meeting._answer(store, rank, 3, deadline)}
            )
        )
        for rank in (1, 2)
    ]
    for thread in early:
        thread.start()
    time.sleep(0.5)
    assert not second, "they took the first start's word for their own"
    word = meeting._call(store, 0, 3, deadline)
    for thread in early:
        thread.join(10)
    assert second == {1: word, 2: word} and word != first[0]


def test_ranks_that_do_not_come_are_named() -> None:
    with pytest.raises(UserError, match="ranks 1, 2 did not start within"):
        meeting._call(dist.HashStore(), 0, 3, time.monotonic() + 0.2)
    with pytest.raises(UserError, match="rank 0, or another one that it waits for, did not"):
        meeting._answer(dist.HashStore(), 1, 3, time.monotonic() - 1)
