"""The first chats of a file as a model's template writes them, and what of them is trained on.

`preview` starts this module as a process of its own: tokenizers and templates are other people's,
and a template that does not end is ended with the process.

    python -m qwen2_ascend.board.preview MODEL DATA
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from qwen2_ascend.data.chat.check import find_formats
from qwen2_ascend.data.chat.rendering import ChatRenderer
from qwen2_ascend.data.chat.rows import find_chat_files, read_chat_rows, where
from qwen2_ascend.data.chat.settings import ChatSettings
from qwen2_ascend.data.inputs import Position
from qwen2_ascend.data.tokenization import parse_row
from qwen2_ascend.errors import UserError, printable
from qwen2_ascend.pretrained import open_tokenizer

NUM_CHATS = 3
SECONDS = 120
MAX_CHARACTERS = 6000
"""Shown of a chat."""
MAX_ROW_BYTES = 1 << 22
MAX_ROWS = 200
"""The most rows that are searched for NUM_CHATS that can be rendered."""


def preview(model: Path, data: Path) -> dict[str, Any]:
    """The chats, by another process.

    Raises:
        UserError: the files cannot be used, or it takes longer than SECONDS.
    """
    words = [sys.executable, "-m", "qwen2_ascend.board.preview", str(model), str(data)]
    try:
        done = subprocess.run(
            words, capture_output=True, timeout=SECONDS, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{data.name}: rendering its chats takes longer than {SECONDS} s."
        ) from None
    try:
        found = json.loads(done.stdout)
    except ValueError:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise UserError(f"{data.name}: cannot be shown: {' '.join(last)}") from None
    if "faults" in found:
        raise UserError(found["faults"])
    return found


def rendered(model: Path, data: Path) -> dict[str, Any]:
    """The first chats of a file.

    Args:
        model: a folder with a tokenizer.
        data: a file of chats.

    Returns:
        `chats`, a list of lists of pieces (`text`, `trained`, and `tokens`, how many they are);
        `format`; `bad`, what is wrong with rows before the last chat shown.

    Raises:
        UserError: no row can be rendered.
    """
    files, reading = find_chat_files([str(data)], "auto", MAX_ROW_BYTES)
    form = find_formats(files, reading, "sft", ChatSettings())[files[0].path]
    tokenizer = open_tokenizer(model)
    renderer = ChatRenderer(tokenizer)
    chats: list[list[dict[str, Any]]] = []
    bad: list[str] = []
    for place, row in _rows(files, reading):
        try:
            (chat,) = form.chats(row())
            (tokens,) = renderer([chat])
            if isinstance(tokens, ValueError):
                raise tokens
            chats.append([_piece(tokenizer, piece) for piece in renderer.cut(chat)])
        except ValueError as error:
            bad.append(f"{place}: {error}")
        if len(chats) == NUM_CHATS:
            break
    if not chats:
        raise UserError(bad[:3] or [f"{data.name}: holds no chat."])
    return {"chats": chats, "format": form.kind, "bad": bad[:5]}


def _rows(files: Any, reading: Any) -> Iterator[tuple[str, Any]]:
    """The places of rows, and what parses each."""
    for row, _, _ in islice(read_chat_rows(files, reading, Position()), MAX_ROWS):
        yield where(row).rsplit("/", 1)[-1], partial(parse_row, row.raw or b"")


def _piece(tokenizer: Any, piece: Any) -> dict[str, Any]:
    ids = tokenizer(piece.text, add_special_tokens=False).input_ids
    text = piece.text
    if len(text) > MAX_CHARACTERS:
        text = f"{text[:MAX_CHARACTERS]}..."
    return {"text": text, "trained": piece.trained, "tokens": len(ids)}


def main() -> None:
    """Prints the chats, or the faults, as JSON."""
    try:
        found = rendered(Path(sys.argv[1]), Path(sys.argv[2]))
    except UserError as error:
        found = {"faults": error.faults}
    except OSError as error:
        found = {"faults": [printable(str(error))]}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
