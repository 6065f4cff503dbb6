"""What every launcher does around its work: quiet foreign warnings, exit statuses, the log."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from qwen2_ascend.cli import EXIT_BROKEN_PIPE, EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USER_ERROR
from qwen2_ascend.errors import UserError, print_any_text, raise_if
from qwen2_ascend.log import Stream, shown_log
from qwen2_ascend.machine import rank
from qwen2_ascend.pasted_flags import Table, expert_faults, split_script
from qwen2_ascend.runtime import ending
from qwen2_ascend.runtime.diagnosis import has_timed_out, is_lost_connection

if TYPE_CHECKING:
    from qwen2_ascend.runtime.watchdog import Watchdog

T = TypeVar("T")

FOREIGN_WARNINGS = (
    # torch 2.13 has new names for what megatron-core calls by its old ones
    "`(torch.distributed.[a-z_]*|load_state_dict)` is deprecated",
    "Please use DTensor instead",
    # about CUDA streams
    "When using [a-z ]* it is recommended to set the environment variable CUDA_DEVICE_MAX",
    # megatron-core looks at .grad of its slices, which have none, before it sets it
    "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
)
"""Beginnings of warnings about code that is not this project's, which no user can act on."""


def parse_flags(kind: type[T], program: str, arguments: Sequence[str] | None) -> T:
    """A command line as settings; on a fault it prints and exits with 2, printing on rank 0 only.

    Args:
        kind: a dataclass of groups of flags; its docstring is the description.
        program: the launcher's file name.
        arguments: the flags; sys.argv's without it.
    """
    try:
        return tyro.cli(
            kind,
            prog=program,
            description=kind.__doc__,
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes,),
            console_outputs=rank() == 0,
        )
    except SystemExit as end:
        if end.code:
            ending.hand_to_torchrun("error: the flags are wrong; what is wrong stands above.")
            if rank():
                ending.wait_for_torchrun()
        raise


def parse_pasted(kind: type[T], program: str, arguments: Sequence[str] | None, table: Table) -> T:
    """Parses as `parse_flags` does; other tools' flags go into the settings' field `pasted`.

    Raises:
        UserError: the words are from a script that no shell can run, or for a
            model with experts.
    """
    rest, pasted = split_script(sys.argv[1:] if arguments is None else arguments, table)
    raise_if(expert_faults(pasted))
    settings: Any = parse_flags(kind, program, rest)
    return replace(settings, pasted=pasted)


def launched(command: Callable[[], None], *, log: Stream = "stdout", goes_on: bool = False) -> int:
    """Calls `command` as one rank of torchrun's or as a process alone.

    Args:
        command: what to call.
        log: where rank 0 writes what the package logs.
        goes_on: whether the command goes on where a line of the log cannot be written.

    Returns:
        0; 2 for a mistake in what was asked for; 1 for a failure; 130 for Ctrl-C. What is wrong is
        printed once on each node, by the rank it happened on, and handed to torchrun, which shows
        the first failure of any rank under its own lines.
    """
    ending.end_with_parent()
    print_any_text()
    try:
        with shown_log(log, goes_on=goes_on):
            status = _status(command)
    except KeyboardInterrupt:
        if rank() == 0:
            print("interrupted", file=sys.stderr, flush=True)
        status = EXIT_INTERRUPTED
    if status and _watchdog() is not None:
        # the interpreter's own end would close process groups, and wait for ranks that are lost
        ending.end_now(status)
    return status


def _status(command: Callable[[], None]) -> int:
    try:
        command()
    except UserError as error:
        return _fail(error.faults, EXIT_USER_ERROR)
    except BrokenPipeError:  # --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except Exception as error:
        return _failed(error)
    return 0


def _failed(error: Exception) -> int:
    name, watchdog = type(error).__name__, _watchdog()
    if watchdog is not None and is_lost_connection(error):
        if ending.stop_received:
            return EXIT_FAILURE
        if (cause := watchdog.cause(has_timed_out(error))) is not None:
            return _fail([cause.message], EXIT_FAILURE, who=cause.who)
    if name in ("NonFiniteError", "LostRankError", "SaveError"):
        return _fail([str(error)], EXIT_FAILURE, kind=name)
    words, text = traceback.format_exc(), str(error)
    if told := _explained(error):
        words += f"error: rank {rank()}: {told}\n"
        text += f"\n{told}"
    return _fail([text], EXIT_FAILURE, kind=name, words=words)


def _fail(
    faults: Sequence[str],
    status: int,
    *,
    who: str | None = None,
    kind: str | None = None,
    words: str | None = None,
) -> int:
    """Says why this process ends, to the user, torchrun and the other ranks.

    Args:
        faults: one line each.
        status: the exit status.
        who: the other rank that failed; "" where the fault names it.
        kind: the kind of an exception, for torchrun.
        words: what is printed instead of the faults.
    """
    text = "\n".join(faults)
    watchdog = _watchdog()
    if watchdog is not None and not watchdog.stand_down():
        ending.wait_for_torchrun()  # a thread is ending this process already
    of_all = kind in ("NonFiniteError", "SaveError")
    if not ending.complain(faults, who=who, words=words, of_all=of_all):
        ending.wait_for_torchrun()
    start = f"{who}: " if who else ""
    ending.hand_to_torchrun(f"{kind}: {text}" if kind else f"error: {start}{text}")
    if watchdog is not None and who is None and kind != "LostRankError":
        watchdog.report(f"{kind}: {text}" if words else text)
    return status


def _watchdog() -> Watchdog | None:
    """What looks after the other ranks, once they have met; without torch they have not."""
    module = sys.modules.get("qwen2_ascend.runtime.meeting")
    meeting = module.current() if module is not None else None
    return meeting.watchdog if meeting is not None else None


def silence_foreign_warnings() -> None:
    """Keeps out of the log what no user can act on."""
    for message in FOREIGN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def _explained(error: BaseException) -> str | None:
    """What an error of the device's software means, where a device had been started."""
    startup = sys.modules.get("qwen2_ascend.runtime.startup")
    return startup.explain(error) if startup is not None else None
