"""`qwen2-ascend migrate`: reads MindSpeed-LLM's scripts and prints the same jobs as ours."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import tyro

from qwen2_ascend.errors import Faults, UserError, printable, raise_if
from qwen2_ascend.files import output_faults, read_text
from qwen2_ascend.migration.memory import memory_line
from qwen2_ascend.migration.programs import PROGRAMS, Job, migrate_command, own_flags
from qwen2_ascend.migration.script import NAMED, Command, Script, Token, read_script, token

MAX_BYTES = 1 << 20
"""The largest script."""
KEPT = ("source", ".", "export", "set", "cd", "mkdir", "ulimit", "unset")
"""Commands around a job that stay as they are."""


@dataclass(frozen=True, kw_only=True)
class MigrateOptions:
    """Turn MindSpeed-LLM's shell scripts into scripts of this project.

    The scripts are read and not run. The result is a script that can be run; its comments say what
    became of each flag that changed, and the memory that the planner expects of a training job.
    """

    script: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SCRIPT.sh ...")
    ]
    """Shell scripts of MindSpeed-LLM's."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the result there instead of printing it; for one script."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parses `argv` and migrates.

    Raises:
        UserError: a script cannot be read, or starts nothing that this project knows.
    """
    options = tyro.cli(MigrateOptions, args=argv)
    raise_if(_option_faults(options))
    faults, texts = Faults(), []
    for path in options.script:
        migrated = faults.collect(lambda path=path: migrate(path))
        if migrated is not None:
            texts.append(migrated[0])
            for note in migrated[1]:
                print(printable(f"{path}: {note}"), file=sys.stderr)
    raise_if(faults)
    if options.output is None:
        print("\n".join(texts), end="")
        return
    options.output.write_text(texts[0], encoding="utf-8")
    os.chmod(options.output, 0o755)
    print(f"written: {options.output}", file=sys.stderr)


def migrate(path: Path) -> tuple[str, list[str]]:
    """The new script, and what is to be said of the old one.

    Raises:
        UserError: it cannot be read, or starts nothing that this project knows.
    """
    try:
        text = read_text(path, "strict", MAX_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}.") from None
    try:
        script = read_script(text.replace("\r\n", "\n"))
        jobs = [(command, migrate_command(command)) for command in script.commands]
    except UserError as error:
        raise UserError(f"{path}: {fault}" for fault in error.faults) from None
    if not any(job for _, job in jobs):
        started = [word.text for command in script.commands for word in command.words]
        others = [text for text in started if text and text.endswith(".py")]
        raise UserError(
            f"{path}: starts {', '.join(others) or 'no program'}; known are {', '.join(PROGRAMS)}."
        )
    notes = [*script.notes, *_notes(jobs)]
    if "\r\n" in text:
        notes.insert(0, "its lines end with carriage returns, with which bash cannot run it")
    return "\n".join(_lines(path, script, jobs, notes)) + "\n", notes


def _option_faults(options: MigrateOptions) -> Iterator[str]:
    if not options.script:
        yield "name at least one script."
    if options.output is not None and len(options.script) > 1:
        yield f"--output {options.output}: takes one script; leave it out, or run one at a time."
    if options.output is not None and options.output.exists():
        yield f"--output {options.output}: is there already; name another file, or remove it."
    else:
        yield from output_faults("--output", options.output)


def _notes(jobs: Sequence[tuple[Command, Job | None]]) -> Iterator[str]:
    """What is left out, and what was meant and is not done."""
    for command, job in jobs:
        name = command.words[0].text if command.words else None
        if job is not None:
            for change in job.changes:
                if change.is_lost:
                    yield f"line {change.line or command.line}: {change.flag}: {change.says}"
        elif name and name.startswith("-"):
            yield (
                f"line {command.line}: {name} is no part of a command: a comment or a blank line "
                "ended the one before it"
            )
        elif name not in KEPT and command.words:
            yield f"line {command.line}: left out: {' '.join(command.source.split())[:80]}"


def _lines(
    path: Path, script: Script, jobs: Sequence[tuple[Command, Job | None]], notes: Sequence[str]
) -> Iterator[str]:
    yield "#!/bin/bash"
    yield f"# Made by `qwen2-ascend migrate {_comment(str(path))}`."
    if notes:
        yield "# What the script says and this one does not:"
        yield from (f"#   {_comment(note)}" for note in notes)
    yield ""
    wanted = [name for _, job in jobs if job for name in _variables(job)]
    yield from script.needed(wanted)
    for command, job in jobs:
        if job is not None:
            yield ""
            yield from _job_lines(job)
        elif command.words and command.words[0].text in KEPT:
            yield command.source


def _job_lines(job: Job) -> Iterator[str]:
    program = job.program
    yield f"# {job.theirs} is {program.command} here. Flags that changed:"
    for change in job.changes:
        yield f"#   {_comment(change.flag)}: {_comment(change.says)}"
    if program.trains:
        yield f"# {_comment(memory_line(job.flags, _num_devices(job.launcher)))}"
    several = own_flags(program.kind)
    words = [*job.launcher, *map(token, program.command.split()), *job.words]
    yield " ".join([*job.command.environment, *_groups(words, several)]) + (
        f" \\\n    {job.command.rest}" if job.command.rest else ""
    )


def _groups(words: Sequence[Token], several: dict[str, bool]) -> Iterator[str]:
    """Words as bash takes them, each flag on a line of its own with its values."""
    is_list = False
    for number, word in enumerate(words):
        text = word.text or ""
        is_flag = text.startswith("--")
        is_list = several.get(text.replace("_", "-"), False) if is_flag else is_list
        starts_line = number and (is_flag or text.endswith(".py"))
        yield ("\\\n    " if starts_line else "") + word.quoted(as_list=is_list)


def _variables(job: Job) -> list[str]:
    """Those whose assignments the new command needs."""
    named = [name for word in (*job.launcher, *job.words) for name in word.variables]
    beside = " ".join([*job.command.environment, job.command.rest])
    return [*named, *NAMED.findall(beside)]


def _num_devices(launcher: Sequence[Token]) -> int | None:
    """The devices of all nodes, as torchrun's flags say it."""
    product = 1
    for flag, default in (("--nproc-per-node", None), ("--nnodes", "1")):
        value = default
        for word, following in pairwise(launcher):
            if (word.text or "").replace("_", "-") == flag:
                value = following.text
        if value is None or not value.isdecimal():
            return None
        product *= int(value)
    return product


def _comment(text: str) -> str:
    """A text that stays behind a #."""
    return printable(" ".join(text.split()))
