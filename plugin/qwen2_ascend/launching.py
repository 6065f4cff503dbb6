"""What every launcher does around its work: quiet foreign warnings, exit statuses, one voice."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from qwen2_ascend.cli import EXIT_BROKEN_PIPE, EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USER_ERROR
from qwen2_ascend.errors import UserError

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
    return tyro.cli(
        kind,
        prog=program,
        description=kind.__doc__,
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
        console_outputs=os.environ.get("RANK", "0") == "0",
    )


def launched(command: Callable[[], None]) -> int:
    """Calls `command` as one rank of torchrun's or as a process alone.

    Returns:
        0; 2 for a mistake in what was asked for; 1 for a failure. What is wrong is printed by
        rank 0, and handed to torchrun, which puts the first failure of any rank under its own
        lines.
    """
    try:
        command()
    except UserError as error:
        _hand_to_torchrun(error)
        _complain(error.faults)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except Exception as error:
        _hand_to_torchrun(error)
        if type(error).__name__ == "NonFiniteError":
            _complain([str(error)])
        else:
            rank = os.environ.get("RANK", "0")
            print(f"rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            if told := _explained(error):
                print(f"error: rank {rank}: {told}", file=sys.stderr, flush=True)
        return EXIT_FAILURE
    return 0


def silence_foreign_warnings() -> None:
    """Keeps out of the log what no user can act on."""
    for message in FOREIGN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def _explained(error: BaseException) -> str | None:
    """What an error of the device's software means, where a device had been started."""
    startup = sys.modules.get("qwen2_ascend.runtime.startup")
    return startup.explain(error) if startup is not None else None


def _hand_to_torchrun(error: BaseException) -> None:
    """torchrun shows the first failing rank's error after its own lines."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _complain(faults: Sequence[str]) -> None:
    if os.environ.get("RANK", "0") == "0":
        for fault in faults:
            print(f"error: {fault}", file=sys.stderr, flush=True)


def voice(rank: int) -> Callable[[str], None]:
    """What prints a line of the log: on rank 0 only."""
    return _say if rank == 0 else _say_nothing


def _say(line: str) -> None:
    print(line, flush=True)


def _say_nothing(line: str) -> None:
    pass
