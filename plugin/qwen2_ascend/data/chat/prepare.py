"""Files of chats, prepared when a run starts: once, by rank 0, and kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
import xxhash

from qwen2_ascend.data.chat.preprocess import preprocess_chats
from qwen2_ascend.data.chat.rows import is_chat_file
from qwen2_ascend.data.chat.settings import ChatSettings
from qwen2_ascend.data.settings import PreprocessSettings
from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.files import missing, read_bytes
from qwen2_ascend.pretrained import TOKENIZER_FILES, pretrained_folder

T = TypeVar("T")

CACHE_FOLDER = ".qwen2_ascend_cache"
CODE = (
    "chat_template.py",
    "data/chat/encoding.py",
    "data/chat/formats.py",
    "data/chat/preprocess.py",
    "data/chat/rendering.py",
    "data/chat/rows.py",
    "data/chat/writing.py",
    "data/tokenization.py",
    "prompt_types.py",
)
"""Files of this package of which a change may change what is prepared."""


class Preparation(NamedTuple):
    """How files of chats are prepared."""

    task: str
    tokenizer: str | Path | None
    chat: ChatSettings
    on_bad_row: str
    data_cache_path: str | Path | None
    workers: int | None


def prepared(words: Sequence[str], preparation: Preparation) -> dict[str, str]:
    """The prefix of each word of --data-path; rank 0 prepares files of chats.

    Every rank calls this, and every rank raises what rank 0 raises.

    Raises:
        UserError: a file cannot be prepared, or its result is not seen on this rank.
    """
    files = [word for word in words if is_chat_file(word)]
    prefixes = {word: word for word in words}
    if not files:
        return prefixes
    raise_if(f"--data-path {word}: {missing(word)}." for word in files if not os.path.isfile(word))
    if preparation.tokenizer is None:
        raise UserError(f"--data-path {files[0]}: to prepare it, say which tokenizer to take.")
    # rank 0 says where: elsewhere the same file may have another time
    prefixes |= _on_rank_0(lambda: {word: _prepare(word, preparation) for word in files})
    for word in files:
        if not list(Path(prefixes[word]).parent.glob(f"{Path(prefixes[word]).name}_packed_*.idx")):
            raise UserError(
                f"{prefixes[word]}, which rank 0 prepared of {word}, is not seen here; "
                "--data-cache-path must be on storage that all nodes share."
            )
    return prefixes


def _cached_prefix(word: str, preparation: Preparation) -> Path:
    """Where the result is kept; other settings, a changed file or other code mean another place.

    A tokenizer is the same wherever it lies: a run that goes on reads a copy in its checkpoint.
    """
    folder = preparation.data_cache_path or Path(word).parent / CACHE_FOLDER
    tokenizer = pretrained_folder(str(preparation.tokenizer))
    template = preparation.chat.chat_template
    deciding = [
        preparation.task,
        preparation.on_bad_row,
        astuple(replace(preparation.chat, chat_template=None)),
        (os.path.abspath(word), *_stamp(Path(word))),  # as the result's own record has it
        [(path.name, _digest(path)) for path in _tokenizer_files(tokenizer)],
        template and template.is_file() and _digest(template),
        _code(),
    ]
    stem = Path(word).name.split(".")[0]
    return Path(folder) / f"{stem}-{xxhash.xxh3_64(repr(deciding).encode()).hexdigest()}"


@cache
def _code() -> tuple[str, ...]:
    """What decides how a chat comes out, besides its row, the settings and the tokenizer."""
    package = Path(__file__).parents[2]
    hashes = (_digest(package / name) for name in CODE)
    return (*hashes, *map(version, ("transformers", "tokenizers", "jinja2")))


def _tokenizer_files(folder: Path) -> Iterator[Path]:
    """The files among TOKENIZER_FILES that a folder has."""
    for name in TOKENIZER_FILES:
        path = folder / name
        yield from filter(Path.is_file, sorted(path.iterdir()) if path.is_dir() else [path])


def _digest(path: Path) -> str:
    return xxhash.xxh3_64(read_bytes(path)).hexdigest()


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _prepare(word: str, preparation: Preparation) -> str:
    """Prepares a file, if that has not been done; the prefix of the result."""
    prefix = _cached_prefix(word, preparation)
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{prefix.parent}: chats cannot be prepared there: {error.strerror}; give "
            "--data-cache-path a folder that can be written."
        ) from None
    task: Any = preparation.task
    on_bad_row: Any = preparation.on_bad_row
    preprocess_chats(
        PreprocessSettings(
            task=task,
            input=(word,),
            output_prefix=prefix,
            tokenizer_name_or_path=str(preparation.tokenizer),
            chat=preparation.chat,
            on_bad_row=on_bad_row,
            workers=preparation.workers,
            resume=True,
        )
    )
    return str(prefix)


def _on_rank_0(work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, on every rank; the others wait.

    Raises:
        UserError: what rank 0 raised, on every rank.
    """
    if not dist.is_initialized():
        return work()
    done, failure = None, None
    if dist.get_rank() == 0:
        try:
            done = work()
        except Exception as error:  # told to the others first, who would wait forever
            failure = error
    # as text: not every exception survives being sent
    told: list[Any] = [done, failure and (isinstance(failure, UserError), _faults(failure))]
    dist.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    done, failed = told
    if failed:
        is_users, faults = failed
        raise UserError(faults) if is_users else RuntimeError(f"rank 0 failed: {faults[0]}")
    return done


def _faults(error: Exception) -> tuple[str, ...]:
    return error.faults if isinstance(error, UserError) else (f"{type(error).__name__}: {error}",)
