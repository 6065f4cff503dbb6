"""Processes that are compared: each holds one side's model and works when it is asked to.

A side has a process of its own, with what it needs loaded once, and is idle while another works:
none meets another's patches, caches or threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

from qwen2_ascend.errors import UserError

T = TypeVar("T")
PROCESS = "qwen2_ascend.benchmark.side"


class Side:
    """A process that answers each line of JSON with another; usable with `with`.

    Args:
        module: a module of this package, as `side.main` takes it.
        arguments: the arguments of the command line.
        threads: OMP_NUM_THREADS.
        environment: variables besides those of this process.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        threads: int,
        environment: Mapping[str, str] = {},
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", PROCESS, module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)} | dict(environment),
            start_new_session=True,
        )

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, question: Any) -> Any:
        """What the process says to `question`.

        Raises:
            UserError: it has ended.
        """
        self.tell(question)
        return self.read()

    def tell(self, question: Any) -> None:
        """Asks, and does not wait for the answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, which reading finds

    def read(self) -> Any:
        """The next thing that the process says; the first one is that it is ready.

        Raises:
            UserError: it has ended.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"a side ended with {self._process.wait(60)}; its last lines say why.")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process, and those that libraries started in it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(60)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class RankedSide:
    """The ranks of one side, asked together; usable with `with`. Its answers are a list.

    Args:
        module: as of `Side`.
        arguments: the arguments of every rank.
        threads: the threads of each.
        processes: how many ranks there are.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], *, threads: int, processes: int
    ) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
        }
        self._ranks: list[Side] = []
        for rank in map(str, range(processes)):
            environment |= {"RANK": rank, "LOCAL_RANK": rank}
            self._ranks.append(Side(module, arguments, threads=threads, environment=environment))

    def __enter__(self) -> RankedSide:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self._ranks:
            rank.close()

    @property
    def pids(self) -> list[int]:
        """The processes', by rank."""
        return [rank.pid for rank in self._ranks]

    def ask(self, question: Any) -> list[Any]:
        """What every rank says to `question`.

        Raises:
            UserError: one has ended.
        """
        for rank in self._ranks:
            rank.tell(question)
        return self.read()

    def read(self) -> list[Any]:
        """The next thing that every rank says.

        Raises:
            UserError: one has ended.
        """
        return [rank.read() for rank in self._ranks]


@contextlib.contextmanager
def running(
    module: str, arguments: Mapping[str, Sequence[str]], *, threads: int
) -> Iterator[dict[str, Side]]:
    """All sides for the length of a block, each started when the one before it has loaded.

    Args:
        module: as of `Side`.
        arguments: every side's arguments, by its name.
        threads: the threads of each.

    Raises:
        UserError: one of them has ended.
    """
    with ExitStack() as stack:
        sides = {}
        for name, words in arguments.items():
            sides[name] = stack.enter_context(Side(module, words, threads=threads))
            sides[name].read()
        yield sides


def interleaved(
    names: Sequence[str], rounds: int, measure: Callable[[str], T]
) -> dict[str, list[T]]:
    """`measure` of every side in each round, each in turn first; a first round is not counted.

    Returns:
        The results of every side in the order of the rounds.
    """
    results: dict[str, list[T]] = {name: [] for name in names}
    for i in range(rounds + 1):
        first = i % len(names)
        for name in (*names[first:], *names[:first]):
            result = measure(name)
            if i:
                results[name].append(result)
    return results
