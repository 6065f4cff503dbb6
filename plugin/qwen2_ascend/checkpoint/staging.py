"""A folder that appears whole or not at all.

Work goes into `.NAME.partial` beside the target NAME, under a lock on `.NAME.lock`. When all is
written and flushed it is renamed to NAME; with an old NAME in place the two are exchanged in one
step. Killed at any moment, NAME is the old state or the new one.

`StagedFolder` does this for a converted checkpoint. A training run locks its --save folder with the
same `FolderLock` for as long as it runs, and publishes each iteration with the same
`publish_folder`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import sys
from pathlib import Path

from qwen2_ascend.errors import UserError, VerificationError
from qwen2_ascend.files import fsync_folder

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, 524)
"""What file systems without locks answer; 524 is the kernel's ENOTSUPP, which NFS hands on."""


class StagedFolder:
    """Use as a context manager, then `publish()`.

    Leaving without it keeps the partial folder, so that `resume` can go on from it, unless the
    exception says that what is there is wrong (VerificationError), or that it was asked for wrongly
    before anything was complete (UserError).

    Attributes:
        target: the folder to be.
        folder: where it is written until then.
        is_resumed: whether there is an earlier run's work in `folder`; known once entered.
    """

    def __init__(self, target: Path, *, resume: bool = False, overwrite: bool = False) -> None:
        """Checks the target; nothing is created yet.

        Raises:
            UserError: the target exists, or an unfinished conversion does, and neither `resume`
                nor `overwrite` says what to do with it.
        """
        self.target = Path(os.path.abspath(target))
        self.folder = partial_folder(self.target)
        self._lock = FolderLock(self.target)
        self._resume, self._overwrite = resume, overwrite
        self._made: list[Path] = []
        self.is_resumed = self._is_complete = False
        self._check()

    def _check(self) -> None:
        self._check_target()
        if not os.path.lexists(self.folder):
            return
        if self.folder.is_symlink() or not self.folder.is_dir():
            raise UserError(f"{self.folder}: is in the way and not a folder; remove it.")
        if not (self._resume or self._overwrite):
            raise UserError(
                f"{self.target}: an unfinished conversion lies beside it in {self.folder.name}; "
                "finish it with --resume or start again with --overwrite."
            )

    def _check_target(self) -> None:
        if not os.path.lexists(self.target):
            return
        if self.target.is_symlink() or not self.target.is_dir():
            raise UserError(f"{self.target}: exists and is not a folder; choose another name.")
        names = os.listdir(self.target)
        if names and not self._overwrite:
            also = "besides --resume " if self._resume and self.folder.is_dir() else ""
            raise UserError(
                f"{self.target}: exists and is not empty; say {also}--overwrite to replace it."
            )
        if names and not any(map(_belongs_to_checkpoint, names)):
            raise UserError(
                f"{self.target}: does not look like a checkpoint folder, so --overwrite will not "
                "replace it; remove it yourself or choose another --save-dir."
            )

    def __enter__(self) -> StagedFolder:
        try:
            self._enter()
        except BaseException:
            self._leave()
            raise
        return self

    def _enter(self) -> None:
        try:
            self._make_parents()
            self._lock.acquire()
            restore_replaced(self.target)
            self._check()  # again: another conversion may have come in between
            self.is_resumed = self._resume and self.folder.is_dir()
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.target}: cannot be written: {error.strerror}.") from None
        if not self.is_resumed:
            empty_folder(self.folder)

    def _make_parents(self) -> None:
        missing = [p for p in self.target.parents if not p.exists()]
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            self._made.append(path)

    def publish(self) -> None:
        """Flushes the folder's entries and makes it the target in one step.

        Raises:
            UserError: the target came into being meanwhile.
        """
        self._is_complete = True
        if self._overwrite and self.target.exists() and os.listdir(self.target):
            publish_folder(self.folder, self.target)
        else:
            publish_new_folder(self.folder, self.target)
        for made in (self.target, *reversed(self._made)):
            fsync_folder(made.parent)

    def __exit__(self, kind: type | None, *_: object) -> None:
        useless = kind is None or issubclass(kind, VerificationError)
        refused = kind is not None and issubclass(kind, UserError)
        if useless or (refused and not (self.is_resumed or self._is_complete)):
            shutil.rmtree(self.folder, ignore_errors=True)
        self._leave()

    def _leave(self) -> None:
        self._lock.release()
        for path in reversed(self._made):
            with contextlib.suppress(OSError):  # not empty: used
                path.rmdir()


class FolderLock:
    """Says on `.NAME.lock` beside a folder NAME that one process writes it; it dies with that."""

    def __init__(self, target: Path) -> None:
        target = Path(os.path.abspath(target))
        self._target = target
        self._file = target.parent / f".{target.name}.lock"
        self._fd: int | None = None

    def acquire(self) -> None:
        """Takes the lock, which this process holds until `release`.

        Raises:
            UserError: another process has it.
            OSError: the folder's parent cannot be written.
        """
        while self._fd is None:
            fd = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                raise UserError(
                    f"{self._target}: another process is writing it; wait until that has ended, "
                    "or choose another folder."
                ) from None
            except OSError as error:  # a network file system without locks
                if error.errno not in _NO_LOCKS:
                    os.close(fd)
                    raise
            if _is_still(fd, self._file):
                self._fd = fd
            else:  # whoever had it removed it just now
                os.close(fd)

    def release(self) -> None:
        """Gives the lock back, if this process has it."""
        if self._fd is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._file)
            os.close(self._fd)
            self._fd = None


def partial_folder(target: Path) -> Path:
    """Where a target is written until it is complete."""
    return target.parent / f".{target.name}.partial"


def publish_folder(folder: Path, target: Path) -> None:
    """Flushes a finished folder and makes it the target; what was there before is removed.

    Killed at any moment, `target` is the old state or the new one, or, on a file system that cannot
    exchange two folders, what `restore_replaced` finds.

    Raises:
        OSError: it cannot be renamed, or what it replaced cannot be removed.
    """
    fsync_tree(folder)
    replaced = _replaced_folder(target)
    if not os.path.lexists(target):
        os.rename(folder, target)
    elif not _exchange(folder, target):
        # not on this file system: the old state lies beside for a moment
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(target, replaced)
        try:
            os.rename(folder, target)
        except OSError:
            os.rename(replaced, target)
            raise
    fsync_folder(target.parent)
    for old in (folder, replaced):
        if old.is_dir():
            try:
                shutil.rmtree(old)
            except OSError as error:
                raise OSError(
                    f"{target} is complete, but what it replaced could not be removed from {old}: "
                    f"{error.strerror}."
                ) from None


def publish_new_folder(folder: Path, target: Path) -> None:
    """Flushes a finished folder and makes it the target, where there is nothing but an empty one.

    Raises:
        UserError: the target came into being meanwhile.
    """
    fsync_tree(folder)
    try:
        os.rename(folder, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise UserError(
            f"{target}: something else was written there meanwhile; it was left alone, and what "
            f"was to stand there is complete in {folder}."
        ) from None
    fsync_folder(target.parent)


def restore_replaced(target: Path) -> None:
    """Puts back what a process killed between the two renames of `publish_folder` left beside."""
    replaced = _replaced_folder(target)
    if replaced.is_dir() and not os.path.lexists(target):
        os.rename(replaced, target)


def _replaced_folder(target: Path) -> Path:
    return target.parent / f".{target.name}.replaced"


def fsync_tree(folder: Path) -> None:
    """Flushes the entries of a folder and of all folders in it, innermost first."""
    for root, _, _ in os.walk(folder, topdown=False):
        fsync_folder(Path(root))


def empty_folder(folder: Path) -> None:
    """Removes everything in a folder; links are removed, not followed."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def _belongs_to_checkpoint(name: str) -> bool:
    return name.startswith(("iter_", "mp_rank_", "qwen2_ascend")) or name.endswith(
        (".safetensors", "safetensors.index.json", "latest_checkpointed_iteration.txt")
    )


def _is_still(fd: int, path: Path) -> bool:
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), there)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step (Linux renameat2); False where that cannot be done."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0
