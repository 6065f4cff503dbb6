"""Prompts from the command line or a JSONL file; results to the terminal or a JSONL file."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from qwen2_ascend.checkpoint.sample import may_be_same
from qwen2_ascend.errors import UserError, at_most, raise_if
from qwen2_ascend.files import json_kind, json_value, output_faults, read_bytes, write_file
from qwen2_ascend.inference.settings import PromptSettings
from qwen2_ascend.prompt_types import PromptType

logger = logging.getLogger(__name__)

RESULTS = ("response", "finish_reason", "num_prompt_tokens", "num_new_tokens")
"""What a result adds to its prompt's line, in place of columns of the same names."""
MODEL = "model"
"""Where the model is, in what is said of how results are made; it is not compared."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One thing to continue."""

    where: str
    """The place for a message: the flag, or file and line."""
    row: Mapping[str, Any]
    """{"prompt": text} or {"messages": [...]}, with whatever else its line has."""

    @property
    def is_chat(self) -> bool:
        return "messages" in self.row


def read_prompts(settings: PromptSettings, prompt_type: PromptType | None = None) -> list[Prompt]:
    """All prompts, in their order.

    Args:
        settings: what is continued.
        prompt_type: how chats are to be written, if flags say so.

    Raises:
        UserError: the file cannot be read, lines of it are not prompts (many at once), or flags
            about chats are given and it has none.
    """
    if settings.prompt_file is None:
        rows = [(f"--prompt {i}", {"prompt": text}) for i, text in enumerate(settings.prompt, 1)]
    else:
        rows = _read_file(settings.prompt_file, is_templated=settings.apply_chat_template)
    prompts = [Prompt(where=where, row=_with_template(row, settings)) for where, row in rows]
    if settings.prompt_file is not None and not any(prompt.is_chat for prompt in prompts):
        given = {"--system-prompt": settings.system_prompt, "--prompt-type": prompt_type}
        raise_if(
            f'{flag} is for "messages", and --prompt-file {settings.prompt_file} has none; say '
            '--apply-chat-template, which makes a message of each "prompt".'
            for flag, value in given.items()
            if value is not None
        )
    return prompts


def _read_file(path: Path, *, is_templated: bool) -> list[tuple[str, dict[str, Any]]]:
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"--prompt-file {path}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt-file {path}: is not UTF-8 ({error}).") from None
    rows, faults = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append((f"{path}:{number}", _row(line, is_templated=is_templated)))
        except ValueError as error:
            faults.append(f"{path}:{number}: {error}")
    raise_if(at_most(faults))
    if not rows:
        raise UserError(f"--prompt-file {path}: has no prompts.")
    return rows


def _row(line: str, *, is_templated: bool) -> dict[str, Any]:
    """A line's prompt.

    Args:
        line: a JSON object.
        is_templated: whether a "prompt" becomes a message.

    Raises:
        ValueError: it is none.
    """
    try:
        row = json_value(line)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}.") from None
    if not isinstance(row, dict):
        raise ValueError(f"is a JSON {json_kind(row)}, not an object.")
    if ("prompt" in row) == ("messages" in row):
        keys = ", ".join(map(repr, row)) or "none"
        raise ValueError(f'needs one of the keys "prompt" and "messages"; it has {keys}.')
    if "prompt" in row and not (isinstance(row["prompt"], str) and row["prompt"]):
        raise ValueError(f'"prompt" is {row["prompt"]!r}, not a text.')
    if not isinstance(row.get("system"), str | None):
        raise ValueError(f'"system" is {row["system"]!r}, not a text.')
    if row.get("system") and "prompt" in row and not is_templated:
        raise ValueError(
            '"system" is for "messages"; say --apply-chat-template, which makes a message of '
            '"prompt".'
        )
    messages = row.get("messages", [{"role": "user"}])
    if not (isinstance(messages, list) and messages):
        raise ValueError('"messages" is not a list of messages.')
    if not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        raise ValueError('"messages" has one that is not {"role": ..., "content": ...}.')
    first = messages[0] if messages[0]["role"] == "system" else {}
    if first and row.get("system") and row["system"] != first.get("content"):
        raise ValueError('has two system prompts, one of them as "system".')
    return row


def _with_template(row: dict[str, Any], settings: PromptSettings) -> dict[str, Any]:
    """`row` as the flags want it: a prompt as a message, a system message in front."""
    if settings.apply_chat_template and "prompt" in row:
        rest = {key: value for key, value in row.items() if key != "prompt"}
        row = {"messages": [{"role": "user", "content": row["prompt"]}], **rest}
    # the row's own column goes first, as in data that is trained on
    system = row.get("system") or settings.system_prompt
    if system is not None and "messages" in row:
        messages = row["messages"]
        if messages[0]["role"] != "system":
            row = {**row, "messages": [{"role": "system", "content": system}, *messages]}
    return row


def _change(name: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What has changed of what results depend on; empty where nothing has."""
    before, after = was.get(name), now.get(name)
    if isinstance(before, dict) and isinstance(after, dict):
        return "" if may_be_same(before, after) else f"{name} of other values"
    return "" if before == after else f"{name} {before} (now {after})"


class OutputFile:
    """Results of all `prompts` as JSONL, in their order, written as FILE.part until complete.

    FILE.part.json beside it says what else the results depend on.

    Raises:
        UserError: it is there already, or FILE.part is not the beginning of this run.
    """

    def __init__(self, settings: PromptSettings, prompts: Sequence[Prompt]) -> None:
        path, resume = settings.output_file, settings.resume
        assert path is not None
        self._path, self._prompts = path, prompts
        self._part = path.with_name(path.name + ".part")
        self._waiting: dict[int, str] = {}
        self._file: TextIO | None = None
        raise_if(output_faults("--output-file", path, is_renamed=True))
        if path.exists() and not settings.overwrite:
            raise UserError(f"--output-file {path}: exists already; say --overwrite to replace it.")
        if self._part.exists() and not (settings.overwrite or resume):
            raise UserError(
                f"--output-file {path}: a stopped run has left {self._part.name}; say --resume to "
                "go on with it, or --overwrite to begin anew."
            )
        self._kept_bytes = 0
        self.num_done = self._find_done() if resume and self._part.exists() else 0
        """Results that a stopped run has left."""
        self._next = self.num_done
        self._made_by: Mapping[str, Any] = {}

    @property
    def is_complete(self) -> bool:
        """Whether all results are there, and only the name is missing."""
        return self.num_done == len(self._prompts)

    def require_made_by(self, made_by: Mapping[str, Any]) -> None:
        """Says what the results depend on besides their prompts, before any is written.

        Raises:
            UserError: results that a stopped run has left are of another model, or were chosen
                otherwise.
        """
        self._made_by = made_by
        if not self.num_done:
            return
        if not self._made_by_file.exists():
            logger.info(
                f"{self._part} is an older release's, which does not say by which model and "
                "options it was begun; it goes on with these"
            )
            return
        was = self._read_made_by()
        names = [name for name in {**was, **made_by} if name != MODEL]  # which may have moved
        if changed := [text for name in names if (text := _change(name, was, made_by))]:
            raise UserError(
                f"--resume: {self._part} was begun otherwise, with {was.get(MODEL)}: "
                f"{'; '.join(changed)}. Say what it was begun with, or --overwrite to begin anew."
            )

    def open(self) -> None:
        """Begins to write; on one rank only.

        Raises:
            UserError: the file cannot be written.
        """
        try:
            self._file = self._part.open("a" if self.num_done else "w", encoding="utf-8")
            self._file.truncate(self._kept_bytes)
            write_file(self._made_by_file, json.dumps(self._made_by, indent=1).encode())
        except OSError as error:
            raise UserError(f"--output-file {self._part}: {error.strerror}.") from None

    def add(self, index: int, result: Mapping[str, Any]) -> None:
        """Writes the result of a prompt once those of all before it are written."""
        row = {**self._prompts[index].row, **result}
        self._waiting[index] = json.dumps(row, ensure_ascii=False) + "\n"
        assert self._file is not None, "open() comes first"
        while (line := self._waiting.pop(self._next, None)) is not None:
            self._file.write(line)
            self._file.flush()
            self._next += 1

    def close(self) -> None:
        """Gives the complete file its name."""
        assert self._file is not None and self._next == len(self._prompts), self._next
        os.fsync(self._file.fileno())
        self._file.close()
        self._part.replace(self._path)
        self._made_by_file.unlink(missing_ok=True)

    @property
    def _made_by_file(self) -> Path:
        return self._part.with_name(f"{self._part.name}.json")

    def _read_made_by(self) -> dict[str, Any]:
        try:
            was = json_value(read_bytes(self._made_by_file))
        except (OSError, ValueError) as error:
            raise UserError(
                f"--resume: {self._made_by_file} cannot be read ({error}), so it is not known "
                f"which model has made {self._part}; say --overwrite to begin anew."
            ) from None
        return was if isinstance(was, dict) else {}

    def _find_done(self) -> int:
        """Whole lines of FILE.part; a torn last one does not count."""
        *lines, _ = self._part.read_bytes().split(b"\n")
        if len(lines) > len(self._prompts):
            raise UserError(self._another_run(len(self._prompts)))
        for number, line in enumerate(lines):
            try:
                found = json_value(line)
            except ValueError:
                found = None
            row = self._prompts[number].row
            wanted = {key: value for key, value in row.items() if key not in RESULTS}
            if not isinstance(found, dict) or "response" not in found:
                raise UserError(self._another_run(number))
            if any(found.get(key) != value for key, value in wanted.items()):
                raise UserError(self._another_run(number))
        self._kept_bytes = sum(len(line) + 1 for line in lines)
        return len(lines)

    def _another_run(self, number: int) -> str:
        return (
            f"--resume: line {number + 1} of {self._part} is not the result of this run's prompt; "
            "say --overwrite to begin anew."
        )


class Terminal:
    """Texts to the standard output, one after the other; the first unfinished one as it comes."""

    def __init__(self, num_prompts: int) -> None:
        self._num_prompts = num_prompts
        self._turn = 0
        self._waiting: dict[int, list[str]] = {}
        self._done: set[int] = set()
        self._head()

    def text(self, index: int, piece: str) -> None:
        """The next piece of a prompt's text."""
        if index == self._turn:
            self._write(piece)
        else:
            self._waiting.setdefault(index, []).append(piece)

    def end(self, index: int) -> None:
        """A prompt's text is complete."""
        self._done.add(index)
        while self._turn in self._done:
            self._write("\n")
            self._turn += 1
            self._head()
            self._write("".join(self._waiting.pop(self._turn, [])))

    def _head(self) -> None:
        if 1 < self._num_prompts > self._turn:
            self._write(f"--- {self._turn + 1} of {self._num_prompts} ---\n")

    def _write(self, piece: str) -> None:
        # half of a surrogate pair, which a model can spell, has no UTF-8
        sys.stdout.write(piece.encode("utf-8", "replace").decode("utf-8"))
        sys.stdout.flush()
