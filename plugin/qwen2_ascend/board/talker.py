"""Models that the Chat page talks to: each a process (talking.py), at most SIDES of them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen2_ascend.board.forms import real, whole
from qwen2_ascend.errors import UserError, printable, shown

SIDES = ("left", "right")
MAX_MESSAGES = 200
MAX_CHARACTERS = 200_000
ROLES = ("system", "user", "assistant")


class Talker:
    """A process with a model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._busy = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "qwen2_ascend.board.talking", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        try:
            self.description = str(self._read()["ready"])
        except BaseException:
            self.close()
            raise

    def answer(self, question: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The lines of the answer to a question, as they come.

        Raises:
            UserError: it answers another one, or has ended.
        """
        if not self._busy.acquire(blocking=False):
            raise UserError("this model is answering; stop that answer first.")
        is_over = False
        try:
            self._write(question)
            while not is_over:
                line = self._read()
                is_over = "done" in line
                yield line
        except UserError:
            is_over = True
            raise
        finally:
            if not is_over:  # whoever asked has gone away
                self.stop()
                with contextlib.suppress(UserError):
                    while "done" not in self._read():
                        pass
            self._busy.release()

    def stop(self) -> None:
        """Ends the answer that is being given."""
        with contextlib.suppress(UserError):
            self._write({"stop": True})

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _write(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except (OSError, ValueError):
            raise UserError("the process that held the model has ended; load it again.") from None

    def _read(self) -> dict[str, Any]:
        """The next line; faults become a UserError."""
        assert self._process.stdout is not None
        try:
            line = self._process.stdout.readline()
        except ValueError:
            line = ""
        if not line:
            raise UserError(
                "the process that held the model has ended (out of memory?); load it again."
            )
        message = json.loads(line)
        if "faults" in message:
            raise UserError(message["faults"])
        return message


class Talkers:
    """The models of both sides of the page."""

    def __init__(self) -> None:
        self._talkers: dict[str, Talker] = {}
        self._lock = threading.Lock()

    def load(self, side: str, folder: Path) -> str:
        """Puts a model on a side, in place of the one that is there.

        Returns:
            What was loaded.

        Raises:
            UserError: it is no model.
        """
        self.unload(side)
        talker = Talker(folder)
        with self._lock:
            older = self._talkers.pop(side, None)
            self._talkers[side] = talker
        if older is not None:
            older.close()
        return talker.description

    def unload(self, side: str) -> None:
        """Frees what a side holds."""
        with self._lock:
            talker = self._talkers.pop(side, None)
        if talker is not None:
            talker.close()

    def talker(self, side: str) -> Talker:
        """The model on a side.

        Raises:
            UserError: there is none.
        """
        with self._lock:
            talker = self._talkers.get(side)
        if talker is None:
            raise UserError("there is no model on this side; load one.")
        return talker

    def loaded(self) -> dict[str, Path]:
        """The folders of the models, by their sides."""
        with self._lock:
            return {side: talker.folder for side, talker in self._talkers.items()}

    def close(self) -> None:
        """Ends all of their processes."""
        for side in SIDES:
            self.unload(side)


def question(form: Mapping[str, Any]) -> dict[str, Any]:
    """What a form asks a model.

    Raises:
        UserError: it is no chat, or a setting cannot be.
    """
    messages = form.get("messages")
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        raise UserError(f"messages: give from 1 to {MAX_MESSAGES} messages.")
    found, characters = [], 0
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if role not in ROLES or not isinstance(content, str):
            raise UserError(f"messages: {printable(shown(message))} is no message.")
        characters += len(content)
        found.append({"role": role, "content": content})
    if characters > MAX_CHARACTERS:
        raise UserError(f"messages: {characters} characters are more than {MAX_CHARACTERS}.")
    temperature = form.get("temperature", 0)
    return {
        "messages": found,
        "max_new_tokens": whole(form, "max_new_tokens", 1, 32_768),
        "temperature": 0 if temperature in (0, "0") else real(form, "temperature", 0, 10),
    }
