"""The process that ranks are forked from: it has imported what they all import.

`python fork_server.py FD` takes orders from FD, a SOCK_SEQPACKET socket with one JSON object per
message, and answers there:

    {"store": true}                       {"port": N}, of a store that the ranks can meet at
    {"script", "log", "environments"}     {"rank": N, "status": N} of each of them when it has ended
    {"end": true}                         {"ended": true} when no process of the launch is left

The imports (torch, megatron-core, transformers) cost seconds of CPU in each process that does them,
a fork of one that has done them costs milliseconds. Linux only, as the rest of the harness.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil

POLL_SECONDS = 0.02
"""How soon the end of a rank is seen."""
MODULES = (
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "megatron.core.dist_checkpointing",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen2.modeling_qwen2",
    "qwen2_ascend.checkpoint.load",
    "qwen2_ascend.training.pretrain",
)
"""What nearly every worker imports after `runtime.start`."""
_PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    # Every descendant of a rank that loses its parent becomes this process's child.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    import_all()
    if (job := serve(channel)) is not None:
        job()


def import_all() -> None:
    """Imports, after the redirects that `runtime.start("cpu")` makes before it imports."""
    from qwen2_ascend.runtime import cpu, megatron_compat

    megatron_compat.prepare_import()
    cpu.redirect_torch()
    cpu.redirect_megatron()
    for name in MODULES:
        importlib.import_module(name)
    gc.freeze()  # a rank's garbage collections look at what is its own, and copy no pages
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads run, and a fork has only one of them"


def serve(channel: socket.socket) -> Callable[[], None] | None:
    """Obeys until nobody is there to give orders; returns in every fork, with what that has to do.

    So a fork leaves through the interpreter's own end, as a script does: exit handlers, threads.
    """
    running: dict[int, int] = {}
    while True:
        if select.select([channel], [], [], POLL_SECONDS if running else None)[0]:
            order = json.loads(channel.recv(1 << 20) or '{"end": true, "all": true}')
            if "end" in order:
                kill_descendants()
                running.clear()
                if "all" in order:
                    return None
                tell(channel, ended=True)
            for rank, job in jobs(order, channel):
                if (pid := os.fork()) == 0:
                    return job
                if rank is not None:
                    running[pid] = rank
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                tell(channel, rank=running.pop(pid), status=os.waitstatus_to_exitcode(status))


def tell(channel: socket.socket, **answer: object) -> None:
    with suppress(BrokenPipeError):
        channel.send(json.dumps(answer).encode())


def jobs(order: dict, channel: socket.socket) -> list[tuple[int | None, Callable[[], None]]]:
    """The forks to make for an order: (its rank, what it does)."""
    if "store" in order:
        return [(None, partial(keep_store, channel))]
    return [
        (int(own["RANK"]), partial(run, order["script"], order["log"], own, channel))
        for own in order.get("environments", [])
    ]


def keep_store(channel: socket.socket) -> None:
    """Keeps what ranks meet at, as torchrun's agent does: it outlives each of them."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    tell(channel, port=store.port)
    while True:
        signal.pause()


def run(script: str, log: str, environment: dict[str, str], channel: socket.socket) -> None:
    """Runs a script as `python script` with this environment, in a session of its own."""
    channel.close()
    os.setsid()
    written = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(written, stream)
    os.close(written)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = [script]
    sys.path[0] = str(Path(script).parent)
    sys.modules["numpy"].random.seed()  # each process begins with its own
    random.seed()
    runpy.run_path(script, run_name="__main__")


def kill_descendants() -> None:
    """Kills until none is left: those that a killed one leaves behind become children here."""
    while left := psutil.Process().children(recursive=True):
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(POLL_SECONDS / 10)


if __name__ == "__main__":
    main()
