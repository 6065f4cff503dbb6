"""What all ranks must know alike before they do anything together, told through the store.

Every rank calls the same functions in the same order, before or after `runtime.start`. They are for
a few small values at the start of a run: each costs a round trip to the store's host.
"""

from __future__ import annotations

import hashlib
import pickle
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from qwen2_ascend.errors import LostRankError, UserError, raise_if
from qwen2_ascend.runtime.meeting import Meeting, meet

T = TypeVar("T")

SHOWN_CHARACTERS = 100
"""Longer values are compared, and shown by their digest."""
MOST_NAMED = 8
"""Ranks that a message names."""
_MARGIN_SECONDS = 2
"""Others wait so much longer than rank 0, which names those that are missing."""

_calls = 0


class _Answer(NamedTuple):
    """What a call gave: a value, or the faults that every rank raises."""

    value: Any
    faults: tuple[str, ...] = ()
    lost: str | None = None


def broadcast_from_first(value: T) -> T:
    """Rank 0's value, on every rank; it must be picklable."""
    return made_by_first(lambda: value)


def made_by_first(make: Callable[[], T]) -> T:
    """What `make` gives on rank 0, on every rank; the others do not call it.

    Raises:
        UserError: on every rank, with the faults that `make` raised on rank 0.
    """
    return _told_by_first(lambda meeting, key: _made(make))


def require_equal(what: str, value: object, note: str = "") -> None:
    """Compares `repr(value)` over all ranks.

    Args:
        what: names it in the message: "the run plan".
        value: with a repr that depends on nothing but what is compared.
        note: why this rank has it, for the message; not compared.

    Raises:
        UserError: on every rank, naming the ranks that differ from rank 0 and their values.
    """
    text = repr(value)
    if len(text) > SHOWN_CHARACTERS:
        text = f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def differing(told: Sequence[Any]) -> tuple[str, ...]:
        found = [rank for rank, row in enumerate(told) if row[0] != told[0][0]]
        if not found:
            return ()
        named = [_value(rank, *told[rank]) for rank in (0, *found[:MOST_NAMED])]
        if (rest := len(found) - MOST_NAMED) > 0:
            named.append(f"{rest} more ranks differ")
        return (
            f"{what} is not the same on all ranks: {'; '.join(named)}. Start every rank with the "
            "same flags, files, environment and packages.",
        )

    _gather((text, socket.gethostname(), note), differing)


def raise_together(faults: Sequence[str]) -> None:
    """Ends all ranks where one has found a fault that the others may not see.

    Raises:
        UserError: on every rank, with each different fault once and the ranks that have it.
    """

    def named(told: Sequence[Any]) -> tuple[str, ...]:
        ranks: dict[str, list[int]] = {}
        for rank, (found, _) in enumerate(told):
            for fault in found:
                ranks.setdefault(fault, []).append(rank)
        return tuple(
            fault if len(of) == len(told) else f"rank {of[0]} on {told[of[0]][1]}: {fault}"
            for fault, of in ranks.items()
        )

    _gather((tuple(faults), socket.gethostname()), named)


def _made(make: Callable[[], Any]) -> _Answer:
    try:
        return _Answer(make())
    except UserError as error:
        return _Answer(None, error.faults)


def _gather(own: Any, judge: Callable[[Sequence[Any]], tuple[str, ...]]) -> None:
    """Rank 0 judges what all ranks tell; its verdict is everybody's."""

    def judged(meeting: Meeting, key: str) -> _Answer:
        keys = [f"{key}/{rank}" for rank in range(1, meeting.world_size)]
        try:
            meeting.store.wait(keys, timedelta(seconds=meeting.patience_seconds))
        except dist.DistStoreError:
            silent = [rank for rank, k in enumerate(keys, 1) if not meeting.store.check([k])]
            return _Answer(None, lost=f"rank(s) {', '.join(map(str, silent))} did not answer.")
        told = [own, *(pickle.loads(meeting.store.get(k)) for k in keys)]
        return _Answer(None, judge(told))

    _told_by_first(judged, own)


def _told_by_first(answer: Callable[[Meeting, str], _Answer], own: Any = None) -> Any:
    """What `answer` gives on rank 0, on every rank.

    Args:
        answer: is called on rank 0 alone, with the name of this call in the store.
        own: what another rank tells rank 0 first; None is nothing.
    """
    global _calls
    meeting, key = meet(), f"agree/{_calls}"
    _calls += 1
    if meeting.rank == 0:
        answered = answer(meeting, key)
        if meeting.world_size > 1:
            meeting.store.set(f"{key}/answer", pickle.dumps(answered))
    else:
        if own is not None:
            meeting.store.set(f"{key}/{meeting.rank}", pickle.dumps(own))
        try:
            wait = timedelta(seconds=meeting.patience_seconds + _MARGIN_SECONDS)
            meeting.store.wait([f"{key}/answer"], wait)
        except dist.DistStoreError as error:
            raise LostRankError("rank 0 did not answer within the time-out.") from error
        answered = pickle.loads(meeting.store.get(f"{key}/answer"))
    if answered.lost:
        raise LostRankError(answered.lost)
    raise_if(answered.faults)
    return answered.value


def _value(rank: int, text: str, host: str, note: str) -> str:
    return f"rank {rank} on {host} has {text}" + (f" ({note.rstrip('.')})" if note else "")
