"""The console command `qwen2-ascend` and the way every command of this project ends.

A command is a module with `main(argv: Sequence[str] | None = None) -> None`. It is imported when
it is asked for, so `qwen2-ascend convert --help` does not wait for torch.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import select
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple

from qwen2_ascend import __version__
from qwen2_ascend.errors import UserError, print_any_text, printable

TRACEBACK_VARIABLE = "QWEN2_ASCEND_TRACEBACK"

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


class Command(NamedTuple):
    """One word after `qwen2-ascend`."""

    module: str
    summary: str


COMMANDS = {
    "convert": Command(
        "qwen2_ascend.checkpoint.command",
        "split a Hugging Face checkpoint into shards, merge it back, or reshard",
    ),
    "migrate": Command(
        "qwen2_ascend.migration.command",
        "turn MindSpeed-LLM's shell scripts into scripts of this project",
    ),
    "preprocess": Command(
        "qwen2_ascend.data.command",
        "turn text or chats into Megatron's .bin/.idx",
    ),
    "compare": Command(
        "qwen2_ascend.comparison.command",
        "compare dumped arrays of two runs: figures, a verdict, a picture",
    ),
    "doctor": Command(
        "qwen2_ascend.doctor.command",
        "show what is installed, which devices there are, and what is wrong with them",
    ),
    "plan": Command(
        "qwen2_ascend.planning.command",
        "say which layouts of a training run fit into memory, and which may be fastest",
    ),
    "board": Command(
        "qwen2_ascend.board.command",
        "serve a page that plans, watches, compares and starts runs, and chats",
    ),
    "benchmark": Command(
        "qwen2_ascend.benchmark.command",
        "measure this machine the way docs/benchmarks.md does",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `qwen2-ascend`.

    Args:
        argv: the words after the program's name; sys.argv's without it.

    Returns:
        The exit status.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _dispatch(words))


def run_command(command: Callable[[], None]) -> int:
    """Calls `command` and turns whatever it raises into an exit status and readable lines.

    Every command ends here: `sys.exit(run_command(main))`. SystemExit passes through, so a
    command may also choose its status itself.

    Returns:
        0; 2 for a UserError, each fault on a line of its own; 130 for Ctrl-C; 141 when whoever
        read the output went away; 1 for any other failure, in one line, with the traceback only
        when QWEN2_ASCEND_TRACEBACK=1 is set.
    """
    print_any_text()
    try:
        command()
        sys.stdout.flush()
    except UserError as error:
        for fault in error.faults:
            _say(f"error: {fault}")
        _traceback_if_wanted()
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        _say("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError as error:
        return EXIT_BROKEN_PIPE if _stdout_is_broken() else _failed(error)
    except Exception as error:
        return _failed(error)
    return 0


def _dispatch(words: list[str]) -> None:
    if not words:
        _say(_help())
        raise SystemExit(EXIT_USER_ERROR)
    name, rest = words[0], words[1:]
    if name in ("-h", "--help", "help"):
        print(_help())
    elif name in ("-V", "--version"):
        print(f"qwen2-ascend {__version__}")
    elif name in COMMANDS:
        # argument parsers take the program's name in their usage line from here
        sys.argv = [f"qwen2-ascend {name}", *rest]
        import_module(COMMANDS[name].module).main(rest)
    else:
        raise UserError(_unknown(name))


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: qwen2-ascend COMMAND [OPTIONS]",
            "",
            "Train and fine-tune Qwen2 / Qwen2.5 with megatron-core on Ascend NPUs.",
            "",
            "commands:",
            *rows,
            "",
            "qwen2-ascend COMMAND --help shows a command's options; --version the version.",
        ]
    )


def _unknown(name: str) -> str:
    kind = "option" if name.startswith("-") else "command"
    close = difflib.get_close_matches(name, [*COMMANDS, "--help", "--version"], n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else f"commands are {', '.join(COMMANDS)}."
    return f"qwen2-ascend has no {kind} {name!r}; {hint}"


def _failed(error: Exception) -> int:
    text = printable(" ".join(str(error).split()))
    kind = type(error).__name__
    what = f"{kind}: {text}" if text else kind
    wanted = _traceback_if_wanted()
    hint = "" if wanted else f" (set {TRACEBACK_VARIABLE}=1 to see the traceback)"
    _say(f"error: {what}{hint}")
    return EXIT_FAILURE


def _traceback_if_wanted() -> bool:
    wanted = os.environ.get(TRACEBACK_VARIABLE, "") not in ("", "0")
    if wanted:
        traceback.print_exc()
    return wanted


def _stdout_is_broken() -> bool:
    """True when stdout's reader has gone; then also keeps Python quiet about it at exit."""
    try:
        fd = sys.stdout.fileno()
    except (OSError, ValueError):
        return False
    poll = select.poll()
    poll.register(fd, 0)
    if not any(events & select.POLLERR for _, events in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
    return True


def _say(line: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        # in one piece, so that what several ranks say does not mix
        print(f"{line}\n", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
