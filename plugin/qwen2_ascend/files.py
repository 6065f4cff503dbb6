"""Opens files: regular ones only, and never more than a bound. Writes small ones whole.

A folder that somebody else made may hold a FIFO, on which opening waits for ever, a device, a link
to another part of the disk, or a file that takes gigabytes once it is parsed. Whatever reads
users' files opens them here; a test walks the package for other ways.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import stat
from collections.abc import Iterable, Iterator
from io import BufferedWriter
from pathlib import Path
from typing import Any, BinaryIO

from qwen2_ascend.errors import UserError

MAX_WHOLE_BYTES = 1 << 28
"""The largest file that is read whole; the largest tokenizer.json is about 11 MB."""
MAX_JSON_VALUES = 500_000
"""The most values of a JSON text: a tenth of a second or so, and at most about 50 MB."""

MAX_DIGITS = 4300
"""The most digits of a whole number in a JSON text, which is Python's own bound."""
POINTER, MAX_POINTER_BYTES = b"version https://git-lfs.github.com/spec/", 1024
"""How a Git LFS pointer begins, and its longest, by the format's specification."""
_JSON_KINDS: dict[type, str] = {
    bool: "boolean",
    int: "number",
    float: "number",
    str: "string",
    dict: "object",
    type(None): "null",
}


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a regular file for reading, in binary.

    Raises:
        UserError: it is a FIFO, a device or a socket, or stands for a file of Git LFS.
        OSError: as from `open`.
    """
    return os.fdopen(open_descriptor(path), "rb")


def open_descriptor(path: str | Path) -> int:
    """Opens a file as `open_regular` does, as a file descriptor."""
    _check_mode(path, os.stat(path))  # before it is opened, which does something to some devices
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check(path, fd)  # again: this is the file that is read
    except BaseException:
        os.close(fd)
        raise
    return fd


def require_regular(path: str | Path) -> None:
    """Checks a file that a library opens itself.

    Raises:
        UserError: it is a FIFO, a device or a socket, or stands for a file of Git LFS.
        OSError: as from `open`.
    """
    status = os.stat(path)
    _check_mode(path, status)
    if status.st_size <= MAX_POINTER_BYTES:
        os.close(open_descriptor(path))


def read_bytes(path: str | Path, most: int = MAX_WHOLE_BYTES) -> bytes:
    """The contents of a regular file.

    Raises:
        UserError: it is not one, or longer than `most` bytes.
        OSError: as from `open`.
    """
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise UserError(f"{path}: longer than the {most} bytes that are read of such a file.")
    return data


def read_text(path: str | Path, errors: str = "strict", most: int = MAX_WHOLE_BYTES) -> str:
    """The UTF-8 text of a regular file; line ends become newlines.

    Raises:
        UserError: as `read_bytes`.
        OSError: as from `open`.
        UnicodeDecodeError: it is not UTF-8.
    """
    data = io.BytesIO(read_bytes(path, most))
    return io.TextIOWrapper(data, encoding="utf-8", errors=errors).read()


def read_json(path: str | Path, **options: Any) -> Any:
    """The value of a regular JSON file; `options` go to `json.loads`.

    Raises:
        UserError: it cannot be read, is not JSON, or is too large to be parsed.
    """
    try:
        with reading(path):
            return parse_json(read_bytes(path), **options)
    except UserError as error:
        faults = error.faults
        raise UserError(f if f.startswith(str(path)) else f"{path}: {f}" for f in faults) from None


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Makes a UserError of an OSError: that `path` cannot be read, and why."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from None


def parse_json(data: bytes, **options: Any) -> Any:
    """The value of a JSON text in UTF-8; `options` go to `json.loads`.

    Raises:
        UserError: it is not JSON, or holds so many values that parsing would take long.
    """
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise UserError(f"it holds more than {MAX_JSON_VALUES} values.")
    try:
        return json_value(data.decode("utf-8"), **options)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"not valid JSON: {error}.") from None


def json_value(text: str | bytes, **options: Any) -> Any:
    """The value of a JSON text of anybody's; `options` go to `json.loads`.

    Raises:
        ValueError: it is none, or is nested deeper than the parser goes (RecursionError there).
    """
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError as error:
        if "integer string conversion" not in str(error):
            raise  # of `options`
        raise ValueError(f"a whole number of more than {MAX_DIGITS} digits") from None


def json_kind(value: Any) -> str:
    """What JSON calls the kind of a value, for a message."""
    return _JSON_KINDS.get(type(value), type(value).__name__)


def missing(path: str | Path) -> str:
    """Why there is no file at `path`, for a message."""
    return "is a folder, name the file in it" if os.path.isdir(path) else "no such file"


def output_faults(flag: str, path: Path | None, *, is_renamed: bool = False) -> Iterator[str]:
    """Why no file can be written at `path`, which `flag` names; found before hours of work.

    Args:
        flag: the flag, for the message.
        path: the file, which may be there already; None where none is asked for.
        is_renamed: it is written beside, and takes the place of what is there.
    """
    if path is None:
        return
    folder = path.absolute().parent
    if path.is_dir():
        yield f"{flag} {path}: is a folder; name a file in it."
    elif not folder.is_dir():
        yield f"{flag} {path}: there is no folder {folder}; make it first."
    elif not os.access(path if path.exists() and not is_renamed else folder, os.W_OK):
        yield f"{flag} {path}: cannot be written; check its permissions."


def regular_files(path: Path) -> list[Path]:
    """`path` if it is a file, or all files below the folder `path`; folders that are links are not.

    FIFOs and their like are among them, and are refused when they are opened.
    """
    if not path.is_dir():
        return [path]
    return sorted(Path(folder, name) for folder, _, names in os.walk(path) for name in names)


def links_out(folder: Path, paths: Iterable[Path]) -> Iterator[str]:
    """What is wrong with `paths`, and all below them, that links lead out of `folder`.

    The folder itself may be a link. A snapshot in a Hugging Face cache may link to its `blobs`.
    """
    root = Path(os.path.realpath(folder))
    blobs = [
        place.parent.parent / "blobs"
        for place in (root, *root.parents)
        if place.parent.name == "snapshots"
    ]
    left, seen = list(paths), set()
    while left:
        path = left.pop()
        real = Path(os.path.realpath(path))
        if not real.is_relative_to(root) and real.parent not in blobs:
            yield (
                f"{path}: a link that leads out of {folder}, to {real}; refused. Put the file "
                "itself there if it belongs to the checkpoint."
            )
        elif real.is_dir() and real not in seen:
            seen.add(real)
            left += path.iterdir()


def write_file(path: Path, data: bytes) -> None:
    """Writes a small file whole."""
    with written_whole(path) as file:
        file.write(data)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BufferedWriter]:
    """A file to write beside `path`, which gets that name when it is complete and flushed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    with naming(path):
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds to an OSError which file it was about; those of file descriptors do not say."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        way_out = "; make room or choose another --save-dir" if full else ""
        raise OSError(f"{path}: cannot be written: {error.strerror}{way_out}.") from None


def fsync_folder(folder: Path) -> None:
    """Flushes a folder's entries to disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _check(path: str | Path, fd: int) -> None:
    status = os.fstat(fd)
    _check_mode(path, status)
    if status.st_size <= MAX_POINTER_BYTES and os.pread(fd, 64, 0).startswith(POINTER):
        raise UserError(
            f"{path}: is a Git LFS pointer, {status.st_size} bytes that stand for the file; get "
            "the file itself with git lfs pull, or download it."
        )


def _check_mode(path: str | Path, status: os.stat_result) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if kind != stat.S_IFREG:
        raise UserError(f"{path}: is {_KINDS.get(kind, 'no file')}, not a regular file; refused.")


_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
