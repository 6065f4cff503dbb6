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
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore

from qwen2_ascend.errors import UserError
from qwen2_ascend.machine import place
from qwen2_ascend.runtime.watchdog import Watchdog

POLL_SECONDS = 0.1
DEFAULT_SECONDS = 600.0
START_SECONDS = 30.0
"""What ranks are given at least to start and to agree: imports take some longer than others. Who is
lost meanwhile is found by its heart, which does stop after the time-out."""


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
    watchdog: Watchdog | None = None
    """Looks after the other ranks; None of a process alone."""

    @property
    def patience_seconds(self) -> float:
        """How long a rank that lives may take to say what it is asked."""
        return max(self.timeout_seconds, START_SECONDS)

    def clone(self, seconds: float) -> Any:
        """The same store by a connection of its own, for a thread that must not wait for others."""
        assert self.server is not None
        return PrefixStore(self.word, _connect(self.server, seconds))


_current: Meeting | None = None


def meet(timeout_seconds: float | None = None) -> Meeting:
    """Waits until all ranks are there; called again it returns the same Meeting.

    Args:
        timeout_seconds: how long a rank waits for the others, here and from here on; None leaves
            it as it is, at first 10 minutes.

    Raises:
        UserError: torchrun's environment is incomplete, or some rank does not come, which the
            message names.
    """
    global _current
    if _current is None:
        _current = _met(timeout_seconds or DEFAULT_SECONDS)
    elif timeout_seconds not in (None, _current.timeout_seconds):
        _current = replace(_current, timeout_seconds=timeout_seconds)
        if _current.watchdog is not None:
            _current.watchdog.allow(timeout_seconds)
    return _current


def current() -> Meeting | None:
    """The meeting this process is in."""
    return _current


def leave() -> None:
    """Ends the watch over the other ranks, and lets `meet` be called again."""
    global _current
    if _current is not None and _current.watchdog is not None:
        _current.watchdog.close()
    _current = None


def _met(timeout_seconds: float) -> Meeting:
    rank, world_size, local_rank = place()
    alone = Meeting(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        timeout_seconds=timeout_seconds,
        store=HashStore(),
    )
    if world_size == 1:  # it talks to nobody: no port to pick, none to be taken
        return alone
    server = _server()
    store, word = _found(server, rank, world_size, timeout_seconds)
    met = replace(alone, store=PrefixStore(word, store), server=server, word=word)
    watchdog = Watchdog(met)
    watchdog.start()
    return replace(met, watchdog=watchdog)


def _found(
    server: tuple[str, int], rank: int, world_size: int, timeout_seconds: float
) -> tuple[Any, str]:
    """The store, and the word of this start in it."""
    deadline = time.monotonic() + max(timeout_seconds, START_SECONDS)
    hosts = _hosts_store(rank)
    while True:
        try:
            left = max(deadline - time.monotonic(), 1)
            store = _connect(server, left, hosts=hosts)
            return store, (_call if rank == 0 else _answer)(store, rank, world_size, deadline)
        except dist.DistNetworkError as error:  # who kept the store may be restarted too
            if hosts or time.monotonic() > deadline:
                raise UserError(
                    f"the ranks cannot be joined: their store at {server[0]}:{server[1]} cannot be "
                    "reached; way out: check that rank 0's machine can be reached under this "
                    f"address, and that no firewall closes the port. ({str(error).splitlines()[0]})"
                ) from error
            time.sleep(POLL_SECONDS)


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


def _connect(server: tuple[str, int], timeout_seconds: float, *, hosts: bool = False) -> Any:
    timeout = timedelta(seconds=timeout_seconds)
    options = {"wait_for_workers": False, "multi_tenant": True} if hosts else {}
    return TCPStore(*server, is_master=hosts, timeout=timeout, **options)


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
            raise _absent(_ranks(list(answers)))
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
    raise _absent("rank 0, or another one that it waits for,")


def _absent(who: str) -> UserError:
    return UserError(
        f"the ranks cannot be joined: {who} did not start within the time-out (at least "
        f"{START_SECONDS:g} s); way out: see what it says itself and whether its machine can be "
        "reached, or raise --distributed-timeout-minutes."
    )


def _ranks(ranks: list[int]) -> str:
    """ "rank 3", "ranks 1, 3"."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
