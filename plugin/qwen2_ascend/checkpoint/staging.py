"""A folder that appears whole or not at all.

Work goes into `.NAME.partial` beside the target NAME, under a lock on that folder itself. When all
is written and flushed it is renamed to NAME; with an old NAME in place the two are exchanged in one
step. Killed at any moment, NAME is the old state or the new one.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import sys
from pathlib import Path

from qwen2_ascend.errors import UserError

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class StagedFolder:
    """Use as a context manager, then `publish()`; leaving without it removes the partial folder.

    KeyboardInterrupt keeps the partial folder, so that `resume` can go on from it.
    """

    def __init__(self, target: Path, *, resume: bool = False, overwrite: bool = False) -> None:
        """Checks the target; nothing is created yet.

        Raises:
            UserError: the target exists, or an unfinished conversion does, and neither `resume`
                nor `overwrite` says what to do with it.
        """
        self.target = Path(os.path.abspath(target))
        self.folder = self.target.parent / f".{self.target.name}.partial"
        self._overwrite = overwrite
        self._fd: int | None = None
        self._published = False
        if resume and overwrite:
            raise UserError("--resume and --overwrite exclude each other.")
        self._check_target()
        if self.folder.exists() and not (resume or overwrite):
            raise UserError(
                f"{target}: an unfinished conversion lies beside it in {self.folder.name}; finish "
                "it with --resume or start again with --overwrite."
            )
        self.is_resumed = resume and self.folder.exists()

    def _check_target(self) -> None:
        if not os.path.lexists(self.target):
            return
        if self.target.is_symlink() or not self.target.is_dir():
            raise UserError(f"{self.target}: exists and is not a folder.")
        names = os.listdir(self.target)
        if names and not self._overwrite:
            raise UserError(f"{self.target}: exists and is not empty; replace it with --overwrite.")
        if names and not any(map(_belongs_to_checkpoint, names)):
            raise UserError(
                f"{self.target}: does not look like a checkpoint folder, so --overwrite will not "
                "replace it; remove it yourself or choose another --save-dir."
            )

    def __enter__(self) -> StagedFolder:
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.target}: cannot be written: {error.strerror}.") from None
        self._lock()
        if not self.is_resumed:
            _empty(self.folder)
        return self

    def _lock(self) -> None:
        self._fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the other one may have published in between: then this is no longer our folder
            held = os.fstat(self._fd).st_ino == os.stat(self.folder).st_ino
        except (BlockingIOError, FileNotFoundError):
            held = False
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            held = True  # a network file system without locks
        if not held:
            self._close()
            raise UserError(
                f"{self.target}: another conversion is writing it; wait for that one, or choose "
                "another --save-dir."
            )

    def publish(self) -> None:
        """Flushes the folder's entries and makes it the target in one step."""
        for root, _, _ in os.walk(self.folder, topdown=False):
            fsync_folder(Path(root))
        replaced = self.target.exists() and _exchange(self.folder, self.target)
        if not replaced:
            if self.target.exists():
                # no exchange on this file system: the old state stays beside for this moment
                old = self.target.parent / f".{self.target.name}.replaced"
                shutil.rmtree(old, ignore_errors=True)
                os.rename(self.target, old)
                os.rename(self.folder, self.target)
                shutil.rmtree(old)
            else:
                os.rename(self.folder, self.target)
        fsync_folder(self.target.parent)
        self._published = True
        if replaced:
            shutil.rmtree(self.folder)

    def __exit__(self, kind: type | None, *_: object) -> None:
        keep = kind is not None and (
            issubclass(kind, KeyboardInterrupt)
            or (self.is_resumed and issubclass(kind, UserError))  # wrong options, not bad bytes
        )
        if not self._published and not keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._close()

    def _close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def fsync_folder(folder: Path) -> None:
    """Flushes a folder's entries to disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(path: Path, data: bytes) -> None:
    """Writes a small file whole: beside its place, flushed, renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    with open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _belongs_to_checkpoint(name: str) -> bool:
    return name.startswith(("iter_", "mp_rank_", "qwen2_ascend")) or name.endswith(
        (".safetensors", "safetensors.index.json", "latest_checkpointed_iteration.txt")
    )


def _empty(folder: Path) -> None:
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step (Linux renameat2); False where that cannot be done."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0
