"""Runs launchers that kill themselves, each in a forked child; started by test_killed_runs.py.

Reads one JSON object per line: "module" and "argv" of a launcher, and "point", the number of the
call, among those that change the disk, before which the child sends itself SIGKILL; null runs to
the end. Answers with the status (negative when killed) and how many such calls were made (only
known when the child ended by itself).
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import wraps
from importlib import import_module

DISK_CALLS = ("ftruncate", "fsync", "rename", "replace", "unlink", "mkdir", "rmdir")
EVERY_WRITE = 100
"""Writes into a file that has no name yet differ little; so many count as one call."""
WARM = (
    "qwen2_ascend.training.pretrain",
    "qwen2_ascend.training.checkpointing",
    "qwen2_ascend.training.setup",
    "qwen2_ascend.finetuning.finetune",
    "qwen2_ascend.finetuning.lora_checkpoint",
    "qwen2_ascend.finetuning.deepspeed.finetune",
    "qwen2_ascend.finetuning.deepspeed.checkpoint",
    "qwen2_ascend.model.build",
    "qwen2_ascend.data.chat.build",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.optimizer",
)


class Killer:
    """Counts calls, of all threads, and kills this process before the one with a given number."""

    def __init__(self, point: int | None) -> None:
        self.point = point
        self.calls = self._writes = 0
        self._lock = threading.Lock()

    def watch(self, function: Callable) -> Callable:
        @wraps(function)
        def watched(*args, **kwargs):
            self.count()
            return function(*args, **kwargs)

        return watched

    def watch_writes(self, pwrite: Callable) -> Callable:
        @wraps(pwrite)
        def watched(*args, **kwargs):
            self._writes += 1
            if self._writes % EVERY_WRITE == 1:
                self.count()
            return pwrite(*args, **kwargs)

        return watched

    def count(self) -> None:
        with self._lock:
            self.calls += 1
            if self.calls == self.point:
                os.kill(os.getpid(), signal.SIGKILL)


def run(module: str, argv: list[str], point: int | None) -> dict:
    """One run in a forked child."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        import torch

        from qwen2_ascend.checkpoint import staging

        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        killer = Killer(point)
        for name in DISK_CALLS:
            setattr(os, name, killer.watch(getattr(os, name)))
        os.pwrite = killer.watch_writes(os.pwrite)
        staging._exchange = killer.watch(staging._exchange)
        torch.save = killer.watch(torch.save)  # how DeepSpeed writes
        status = import_module(module).main(argv)
        os.write(write_end, str(killer.calls).encode())
        os._exit(status)
    os.close(write_end)
    _, status = os.waitpid(pid, 0)
    calls = os.read(read_end, 20)
    os.close(read_end)
    return {"status": os.waitstatus_to_exitcode(status), "calls": int(calls or 0)}


def serve() -> None:
    """Answers one request per line of stdin."""
    from qwen2_ascend.runtime import cpu

    cpu.redirect_torch()
    cpu.redirect_megatron()
    for name in WARM:
        import_module(name)
    gc.collect()
    gc.freeze()  # what is warm now is shared with every child
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    serve()
