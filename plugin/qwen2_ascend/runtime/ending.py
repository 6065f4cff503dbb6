"""How a process of a run ends: with its parent, and with one line that says why.

Only the standard library is imported: a launcher calls this before anything else.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from qwen2_ascend.machine import local_rank, rank

FIRST_SECONDS = 2
"""How long a rank waits for the first of its node to say the same fault."""
FIRST_OF_ALL_SECONDS = 60
"""The same where all ranks are known to have it, and the first may have to finish reports."""
SILENT_SECONDS = 5
"""How long a rank whose fault is said already waits for torchrun to end it, which then counts one
failure instead of one for each rank."""
_PR_SET_PDEATHSIG = 1
_parent = os.getppid()
_ends_with_parent = False
_forking: int | None = None
"""The process that forks, where it does so in its main thread."""

stop_received = False
"""Whether this process was told to stop and is going to: what fails after that needs no words."""


def end_with_parent() -> None:
    """Lets the kernel kill a rank when its torchrun is gone, and what it forks when it is gone.

    A plain process outlives the shell that started it, as nohup wants it.
    """
    global _ends_with_parent
    if _ends_with_parent:
        return
    _ends_with_parent = True
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with(_parent)
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


def _end_with(parent: int) -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel knew
        os._exit(1)


def _before_fork() -> None:
    # The signal comes when the thread that forked ends, not the process.
    global _forking
    is_main = threading.current_thread() is threading.main_thread()
    _forking = os.getpid() if is_main else None


def _after_fork() -> None:
    if _forking is not None:
        _end_with(_forking)


def complain(
    faults: Sequence[str],
    *,
    who: str | None = None,
    words: str | None = None,
    of_all: bool = False,
) -> bool:
    """Prints what is wrong, unless a rank of this node has printed the same.

    Args:
        faults: one line each.
        who: whose fault it is; this rank's without it.
        words: what is printed instead, after "rank N failed:".
        of_all: whether all ranks are known to have it.

    Returns:
        Whether it was printed here.
    """
    said = _claim("\n".join(faults), FIRST_OF_ALL_SECONDS if of_all else FIRST_SECONDS)
    if said and words:
        _write(f"rank {rank()} failed:\n{words}")
    elif said:
        if who is None:
            who = f"rank {rank()}" if rank() else ""
        start = f"error: {who}: " if who else "error: "
        _write("".join(f"{start}{fault}\n" for fault in faults))
    return said


def _write(text: str) -> None:
    """Writes past Python's buffers: whoever holds their lock may never let go."""
    if sys.stderr is not sys.__stderr__:  # somebody collects what is printed
        print(text, end="", file=sys.stderr, flush=True)
        return
    with suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())


def _claim(text: str, seconds: float) -> bool:
    """Whether this rank is the one of its node to say it; the first has precedence for a while."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file is None:
        return True
    # torchrun gives each rank a folder in one of the node's and of this start
    mark = Path(error_file).parents[1] / f"said.{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    deadline = time.monotonic() + seconds * bool(local_rank())
    while time.monotonic() < deadline and not mark.exists():
        time.sleep(0.05)
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def wait_for_torchrun() -> None:
    """Waits a moment to be ended by torchrun, which has seen the rank that failed first.

    It counts every rank as failed that does not end with 0 then.
    """
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
        time.sleep(SILENT_SECONDS)


def end_now(status: int) -> NoReturn:
    """Ends this process without the interpreter's tidying up; the kernel ends what it forked."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def hand_to_torchrun(message: str) -> None:
    """Makes `message` what torchrun shows of this rank's failure under its own lines."""
    if (path := os.environ.get("TORCHELASTIC_ERROR_FILE")) is None:
        return
    extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
    with suppress(OSError):
        Path(path).write_text(
            json.dumps({"message": {"message": message, "extraInfo": extra}}), encoding="utf-8"
        )
