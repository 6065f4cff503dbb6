"""How the ranks of one start find each other: a store that only they know.

torchrun keeps its store over restarts, with all that earlier ranks have written: addresses that
nobody listens at any more. The number of restarts does not tell starts apart either, as the nodes
of a run count for themselves. So rank 0 draws a word for each start, every rank answers it with a
word of its own, and rank 0 repeats that: what an earlier start left behind cannot be the answer.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from qwen2_ascend.errors import LostRankError, UserError

POLL_SECONDS = 0.1
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """This process's place among the ranks, and what they talk through before any group exists."""

    rank: int
    world_size: int
    local_rank: int
    timeout_seconds: float
    """How long a rank waits for the others."""
    store: Any
    """A key-value store of this start's ranks; a process alone has one of its own."""
    server: tuple[str, int] | None = None
    """Host and port of who keeps the store; None of a process alone."""
    word: str = ""
    """The name of this start in the store."""

    def clone(self) -> Any:
        """The same store by a connection of its own, for a thread that must not wait for others."""
        assert self.server is not None
        return dist.PrefixStore(self.word, _connect(self.server, self.timeout_seconds))


_current: Meeting | None = None


def meet(timeout_seconds: float = 600) -> Meeting:
    """Waits until all ranks are there; called again it returns the same Meeting.

    Raises:
        UserError: torchrun's environment is incomplete.
        LostRankError: some rank does not come; the message names it.
    """
    global _current
    if _current is None:
        _current = _met(timeout_seconds)
    return _current


def forget() -> None:
    """Lets `meet` be called again."""
    global _current
    _current = None


def _met(timeout_seconds: float) -> Meeting:
    rank, world_size, local_rank = place()
    common = dict(world_size=world_size, local_rank=local_rank, timeout_seconds=timeout_seconds)
    if "WORLD_SIZE" not in os.environ:
        # A process alone talks to nobody: no port to pick, none to be taken.
        return Meeting(rank=rank, store=dist.HashStore(), **common)  # pyright: ignore[reportPrivateImportUsage]
    server = _server()
    deadline = time.monotonic() + timeout_seconds
    store = _host(server, timeout_seconds) if _hosts_store(rank) else None
    while True:
        try:
            store = store or _connect(server, max(deadline - time.monotonic(), 1))
            word = (_call if rank == 0 else _answer)(store, rank, world_size, deadline)
            break
        except dist.DistNetworkError as error:  # who kept the store is restarted too
            if time.monotonic() > deadline or _hosts_store(rank):
                raise LostRankError(
                    f"the store at {server[0]}:{server[1]} cannot be reached: {error}"
                ) from error
            store = None
            time.sleep(POLL_SECONDS)
    return Meeting(
        rank=rank, store=dist.PrefixStore(word, store), server=server, word=word, **common
    )


def place() -> tuple[int, int, int]:
    """(rank, world size, local rank) from torchrun, or of a single process.

    Raises:
        UserError: a part of it is missing or no number.
    """
    values = [os.environ.get(name) for name in _NAMES]
    if values[1] is None:
        return 0, 1, 0
    if missing := [name for name, value in zip(_NAMES, values, strict=True) if value is None]:
        raise UserError(
            f"WORLD_SIZE={values[1]} is set but {', '.join(missing)} is not; start with torchrun, "
            "or unset WORLD_SIZE for a single process."
        )
    rank, world_size, local_rank = (int(value) for value in values if value is not None)
    return rank, world_size, local_rank


def _server() -> tuple[str, int]:
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not address or not port:
        raise UserError(
            f"MASTER_ADDR={address} and MASTER_PORT={port}: WORLD_SIZE is set, so both are needed; "
            "start with torchrun, or unset WORLD_SIZE for a single process."
        )
    return address, int(port)


def _hosts_store(rank: int) -> bool:
    """Whether this rank keeps the store: under torchrun its agent does."""
    return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _host(server: tuple[str, int], timeout_seconds: float) -> Any:
    return dist.TCPStore(
        *server,
        is_master=True,
        timeout=timedelta(seconds=timeout_seconds),
        wait_for_workers=False,
        multi_tenant=True,
    )


def _connect(server: tuple[str, int], timeout_seconds: float) -> Any:
    return dist.TCPStore(*server, is_master=False, timeout=timedelta(seconds=timeout_seconds))


def _call(store: Any, rank: int, world_size: int, deadline: float) -> str:
    """Rank 0's part: draws the word of this start and takes down who answers it."""
    word = f"start/{secrets.token_hex(8)}"
    store.set("start", word)
    answers = {other: f"{word}/from/{other}" for other in range(1, world_size)}
    while answers:
        come = [other for other, key in answers.items() if store.check([key])]
        for other in come:
            store.set(f"{word}/to/{other}", store.get(answers.pop(other)))
        if answers and time.monotonic() > deadline:
            raise LostRankError(f"{_ranks(list(answers))} did not start within the time-out.")
        if not come:
            time.sleep(POLL_SECONDS)
    return word


def _answer(store: Any, rank: int, world_size: int, deadline: float) -> str:
    """Another rank's part: answers whatever word is there until its own answer is repeated."""
    own = f"{secrets.token_hex(8)} {socket.gethostname()}".encode()
    answered = None
    # Rank 0 is given a little longer: it names those that are missing.
    while time.monotonic() < deadline + 10 * POLL_SECONDS:
        if store.check(["start"]):
            if (word := store.get("start").decode()) != answered:
                store.set(f"{word}/from/{rank}", own)
                answered = word
            if store.check([reply := f"{word}/to/{rank}"]) and store.get(reply) == own:
                return word
        time.sleep(POLL_SECONDS)
    raise LostRankError("rank 0 did not start, or other ranks did not, within the time-out.")


def _ranks(ranks: list[int]) -> str:
    """ "rank 3", "ranks 1, 3"."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
