"""The --save folder of a run: how an iteration is begun, published, found again and removed.

    SAVE/config.json, tokenizer files ...          so that merging needs this folder alone
    SAVE/iter_0000100/                             what the run's format writes, and its manifest
    SAVE/latest_checkpointed_iteration.txt         written last, by rename

One process does this, under the lock of the folder. An iteration is written beside its place and
renamed into it when every rank's part is on the disk and the manifest is in it: an iteration with a
manifest is complete, whether the tracker file names it or not. Killed at any moment, the folder
holds every iteration that was announced.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from qwen2_ascend.checkpoint.formats import megatron
from qwen2_ascend.checkpoint.staging import partial_folder, publish_folder, restore_replaced
from qwen2_ascend.errors import UserError
from qwen2_ascend.files import read_bytes, write_file

_PLACE = re.compile(r"\.(iter_[0-9]+)\.(partial|replaced|removed)")


def iteration_path(save: Path, iteration: int) -> Path:
    """The folder of one iteration."""
    return save / f"iter_{iteration:07d}"


def begin_iteration(save: Path, iteration: int) -> Path:
    """The empty folder that an iteration is written into.

    Raises:
        OSError: it cannot be written.
    """
    recover(save)
    partial = partial_folder(iteration_path(save, iteration))
    partial.mkdir(parents=True)
    return partial


def recover(save: Path) -> None:
    """Puts right what a killed run left: replaced iterations back, unfinished ones away.

    Raises:
        OSError: it cannot be written.
    """
    if not save.is_dir():
        return
    for path in sorted(save.iterdir()):
        match = _PLACE.fullmatch(path.name)
        if match and match[2] == "replaced":
            restore_replaced(save / match[1])
        if match and path.exists():
            shutil.rmtree(path)


def publish_iteration(save: Path, iteration: int, side_files: Mapping[Path, bytes]) -> Path:
    """Gives a complete folder its name and makes it the one that the tracker file names.

    Args:
        save: the run's folder.
        iteration: its folder was made by `begin_iteration` and holds everything.
        side_files: what lies beside the iterations, by its place in `save`.

    Returns:
        The folder of the iteration.

    Raises:
        OSError: it cannot be written; `save` holds the last checkpoint.
    """
    target = iteration_path(save, iteration)
    for path, data in side_files.items():
        if not _holds(save / path, data):
            write_file(save / path, data)
    publish_folder(partial_folder(target), target)
    write_file(save / megatron.TRACKER_FILE, str(iteration).encode())
    return target


def remove_older(save: Path, keep: int, last: int) -> None:
    """Removes the complete iterations before the `keep` that end with `last`, the oldest first.

    Later ones, of a run that went further, stay until they are written again. The last one stays
    whatever `keep` is. Each is renamed before its files go, so that none looks whole that is not.

    Raises:
        OSError: one cannot be removed.
    """
    up_to = iteration_path(save, last)
    complete = [path for path in megatron.complete_iterations(save) if path.name <= up_to.name]
    for path in complete[max(keep, 1) :][::-1]:
        removed = path.with_name(f".{path.name}.removed")
        os.rename(path, removed)
        shutil.rmtree(removed)


def resumable_iterations(save: Path) -> list[Path]:
    """Where a run may go on, the best first: the tracked iteration, then older complete ones."""
    tracked = megatron.tracked_folder(save)
    if tracked == save or not tracked.is_dir():
        return megatron.complete_iterations(save)
    return [tracked, *older_iterations(tracked)]


def older_iterations(iteration: Path) -> list[Path]:
    """The complete iterations before one, in its folder, the newest first."""
    complete = megatron.complete_iterations(iteration.parent)
    return [path for path in complete if path.name < iteration.name]


def _holds(path: Path, data: bytes) -> bool:
    with contextlib.suppress(OSError, UserError):
        return path.stat().st_size == len(data) and read_bytes(path) == data
    return False
