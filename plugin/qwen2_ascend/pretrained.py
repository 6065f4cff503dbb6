"""The one place where transformers opens a folder that somebody else has made.

No code of that folder runs, whatever it or the standard input says; a folder that wants its own is
refused. Its files must be regular files inside it. Nothing here imports transformers by itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.files import links_out, read_json, reading, require_regular

VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates",
)
"""What a tokenizer is made of: files, and a folder of files."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
SHOWN = 200
"""Characters that a message quotes of a text from elsewhere."""


def open_pretrained(auto_class: Any, folder: str | Path, **keywords: Any) -> Any:
    """What `auto_class.from_pretrained` makes of a folder, without code of the folder's own.

    Args:
        auto_class: a class of transformers, AutoConfig or a model's class, for example.
        folder: a Hugging Face folder.
        keywords: further ones for `from_pretrained`.

    Raises:
        UserError: the folder wants its own code, or has files that are not its own regular ones.
    """
    asked = ("AutoConfig", auto_class.__name__)
    raise_if([*_foreign_files(Path(folder)), *_own_code(Path(folder), asked)])
    return auto_class.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, **keywords
    )


def open_tokenizer(path: str | Path, **keywords: Any) -> Any:
    """The transformers tokenizer of a folder, or of a model in the local Hugging Face cache.

    Raises:
        UserError: there is none, or the folder is refused.
    """
    from transformers import AutoTokenizer

    folder = pretrained_folder(path)
    try:
        # without these transformers 5 makes up a tokenizer that knows no text
        if not any((folder / name).exists() for name in VOCABULARY_FILES):
            raise FileNotFoundError(f"there is none of {', '.join(VOCABULARY_FILES)}")
        tokenizer = open_pretrained(AutoTokenizer, folder, **keywords)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{folder}: no tokenizer can be read from it ({one_line(error)}); name the model's "
            "Hugging Face folder, with its tokenizer.json, with --tokenizer-name-or-path."
        ) from error
    _check_templates(folder, tokenizer.chat_template)
    return tokenizer


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file of a Hugging Face folder holds.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, not a JSON object.")
    return value


def is_encodable(text: str) -> bool:
    """Whether a text can be tokenized: JSON and command lines may hold halves of characters."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def one_line(text: object, limit: int = SHOWN) -> str:
    """A text from elsewhere for a message: on one line, printable, not endless.

    Libraries quote exceptions in their own; their names say nothing to a user.
    """
    words = " ".join(_EXCEPTION_NAME.sub("", str(text)).split())[: limit + 1]
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    return shown if len(words) <= limit else shown[:limit] + "..."


_EXCEPTION_NAME = re.compile(r"\b(?:[A-Z]\w*\.)*[A-Z]\w*(?:Error|Exception): ")


def _check_templates(folder: Path, templates: Any) -> None:
    """What transformers takes as it is, and fails on when it renders.

    Raises:
        UserError: a chat template is no text.
    """
    named = templates if isinstance(templates, Mapping) else {"chat_template": templates}
    for name, template in named.items():
        if not isinstance(template, str | None):
            raise UserError(
                f"{folder}: its chat template {one_line(name)} is {one_line(repr(template), 40)}, "
                "not a text."
            )


def pretrained_folder(path: str | Path) -> Path:
    """`path`, or where the local Hugging Face cache has the model of that name.

    Raises:
        UserError: neither is there.
    """
    if os.path.lexists(path):
        return Path(path)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(path), local_files_only=True))
    except Exception:
        raise UserError(
            f"--tokenizer-name-or-path {path}: no such folder; give the model's Hugging Face "
            "folder, with its tokenizer.json."
        ) from None


def _foreign_files(folder: Path) -> Iterator[str]:
    """What is wrong with the kinds of files in `folder`, and with where its links lead."""
    templates = folder / "additional_chat_templates"
    with reading(folder):
        paths = sorted(folder.iterdir())
        if templates.is_dir() and not templates.is_symlink():
            paths += sorted(templates.iterdir())
    for path in paths:
        try:
            require_regular(path)
        except UserError as error:
            yield from error.faults
        except OSError:
            pass  # a folder, or a link to nothing, which is no file to transformers either
        else:
            if not path.name.endswith(WEIGHTS):
                yield from links_out(folder, [path])
    yield from links_out(folder, [templates])


def _own_code(folder: Path, classes: tuple[str, ...]) -> Iterator[str]:
    """The files by which `folder` asks for code of its own to be run, one sentence each.

    Args:
        folder: a Hugging Face folder.
        classes: what it is opened with, by the names that `auto_map` has for them.
    """
    for name in ("tokenizer_config.json", "config.json"):
        path = folder / name
        if not path.exists():
            continue
        wanted = read_json_object(path).get("auto_map")
        if isinstance(wanted, Mapping):
            wanted = {key: wanted[key] for key in classes if wanted.get(key)}
        if wanted:
            yield (
                f"{path}: wants code of its own to be run (auto_map: {one_line(wanted)}), and no "
                "code that comes with a model is run here. Where the model is a plain Qwen2 or "
                "Qwen2.5, take auto_map out of that file."
            )
