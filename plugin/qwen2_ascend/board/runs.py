"""A run's folder: how far it is, how it was configured, where, its checkpoints and its log."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen2_ascend.board.listing import METRICS_FILE
from qwen2_ascend.board.metrics import Row, last_rows, number
from qwen2_ascend.checkpoint.formats.megatron import TRACKER_FILE, is_checkpoint_folder
from qwen2_ascend.errors import UserError, printable
from qwen2_ascend.files import open_regular, read_json
from qwen2_ascend.planning.log import RUN_FILE
from qwen2_ascend.training.saved_run import find_saved_run

LIVE_SECONDS = 60.0
"""A run is live when its metrics were written so recently, or within LIVE_STEPS of its steps."""
LIVE_STEPS = 5
LOG_NAMES = ("run.log", "log.txt", "train.log")
LOG_SUFFIXES = (".log", ".out")
LOG_BYTES = 1 << 16
LOG_LINES = 200
MAX_SHOWN = 400
"""Characters of a value of the configuration."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """A run in the list."""

    iteration: int | None = None
    train_iters: int | None = None
    loss: float | None = None
    validation_loss: float | None = None
    tokens_per_second: float | None = None
    modified: float
    """The time metrics.jsonl was last written, in seconds since 1970."""
    is_live: bool
    size: int
    """Bytes of metrics.jsonl."""
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Description:
    """What is known of how a run was made, whoever said it."""

    configuration: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    train_iters: int | None = None
    planned_memory_bytes: int | None = None
    peak_flops: float | None = None
    """FLOP/s that one device can do, where the planner knows them; MFU is a share of these."""
    notes: list[str] = field(default_factory=list)
    """What could not be read, and why."""


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """A checkpoint of a run."""

    name: str
    folder: str
    size: int
    modified: float
    is_last: bool
    """Whether it is the one that the run would go on from."""


def run_state(folder: Path) -> RunState:
    """How far a run is, from the end of its metrics."""
    path = folder / METRICS_FILE
    try:
        status = path.stat()
        training, validation = last_rows(path)
    except (OSError, UserError) as error:
        return RunState(modified=0.0, is_live=False, size=0, error=reason(error))
    described: dict[str, Any] = {}
    with contextlib.suppress(UserError):  # `describe` says why
        described = _described(folder)
    found = None
    if training is None and validation is None and status.st_size:
        found = f"{METRICS_FILE}: its end holds no row of a log."
    return RunState(
        iteration=_iteration(training, validation),
        train_iters=_whole(described.get("train_iters")),
        loss=number(training, "loss"),
        validation_loss=number(validation, "validation_loss"),
        tokens_per_second=number(training, "tokens_per_second"),
        modified=status.st_mtime,
        is_live=_is_live(status.st_mtime, training, described),
        size=status.st_size,
        error=found,
    )


def _is_live(modified: float, training: Row | None, described: Mapping[str, Any]) -> bool:
    total, iteration = _whole(described.get("train_iters")), number(training, "iteration")
    if total is not None and iteration is not None and iteration >= total:
        return False
    seconds = LIVE_STEPS * (number(training, "step_seconds") or 0.0)
    return time.time() - modified < max(LIVE_SECONDS, seconds)


def _iteration(*rows: Row | None) -> int | None:
    return max((row["iteration"] for row in rows if row is not None), default=None)


def describe(folder: Path) -> Description:
    """How a run was made: its run.json, or what its last checkpoint says of it."""
    notes: list[str] = []
    try:
        described = _described(folder)
    except UserError as error:
        described = {}
        notes.append(str(error))
    configuration = _texts(described.get("flags")) | _texts(described.get("model"), "model.")
    if not configuration:
        try:
            configuration = _from_checkpoint(folder)
        except Exception as error:  # a foreign or damaged checkpoint; the page says so
            notes.append(printable(f"{folder.name}: {error or type(error).__name__}"))
    return Description(
        configuration=configuration,
        environment=_texts(described.get("environment")),
        train_iters=_whole(described.get("train_iters")),
        planned_memory_bytes=_whole(described.get("planned_memory_bytes")),
        peak_flops=_peak(number(described, "peak_flops")),
        notes=notes,
    )


def _described(folder: Path) -> dict[str, Any]:
    path = folder / RUN_FILE
    if path.is_symlink():
        raise UserError(f"{path.name}: is a link; the board follows none from a run's folder.")
    if not path.exists():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path.name}: holds no object.")
    return value


def _from_checkpoint(folder: Path) -> dict[str, str]:
    if not is_checkpoint_folder(folder):
        return {}
    tracker = folder / TRACKER_FILE
    if tracker.is_symlink() or (folder / (_last_iteration(folder) or "")).is_symlink():
        raise UserError("its checkpoint is a link; the board follows none from a run's folder.")
    saved = find_saved_run(folder)
    return {} if saved is None else _texts(vars(saved.common["args"]))


def differences(first: Mapping[str, str], second: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every name of two descriptions with both values, and whether they differ.

    What differs comes first; within that, the order is the first one's.
    """
    names = dict.fromkeys((*first, *second))
    rows = [{"name": name, "first": first.get(name), "second": second.get(name)} for name in names]
    for row in rows:
        row["differs"] = row["first"] != row["second"]
    return sorted(rows, key=lambda row: not row["differs"])


def checkpoints(folder: Path) -> list[CheckpointState]:
    """A run's checkpoints that are there as a whole, the newest first."""
    last = _last_iteration(folder)
    found = []
    for path in _iteration_folders(folder):
        size, modified = _folder_size(path)
        found.append(
            CheckpointState(
                name=path.name,
                folder=str(path),
                size=size,
                modified=modified,
                is_last=path.name == last,
            )
        )
    return sorted(found, key=lambda one: one.name, reverse=True)


def _iteration_folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if e.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return [folder / name for name in names if re.fullmatch(r"iter_\d{7,12}|release", name)]


def _last_iteration(folder: Path) -> str | None:
    try:
        with open_regular(folder / TRACKER_FILE) as file:
            word = file.read(32).decode("ascii", "replace").strip()
    except (OSError, UserError):
        return None
    return f"iter_{int(word):07d}" if re.fullmatch(r"[0-9]{1,12}", word) else word


def _folder_size(folder: Path) -> tuple[int, float]:
    """Bytes of the files in a folder and its folders, and when it was last changed."""
    size, modified = 0, 0.0
    for place, _, names in os.walk(folder):
        for name in names[:10_000]:
            try:
                status = os.lstat(os.path.join(place, name))
            except OSError:
                continue
            size, modified = size + status.st_size, max(modified, status.st_mtime)
    return size, modified


def find_log(folder: Path) -> Path | None:
    """The file that a run's output went into, if it lies in its folder: the newest such."""
    try:
        with os.scandir(folder) as entries:
            files = [
                (entry.stat(follow_symlinks=False).st_mtime, entry.name)
                for entry in entries
                if entry.is_file(follow_symlinks=False)
                and (entry.name in LOG_NAMES or entry.name.endswith(LOG_SUFFIXES))
            ]
    except OSError:
        return None
    return folder / max(files)[1] if files else None


def log_tail(path: Path) -> list[str]:
    """The last lines of a log, printable; of a progress bar's line what is seen last.

    Raises:
        OSError, UserError: it cannot be read.
    """
    with open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - LOG_BYTES))
        data = file.read(LOG_BYTES)
    found = data.decode("utf-8", "replace").split("\n")
    if size > LOG_BYTES and len(found) > 1:
        found = found[1:]  # it is cut
    shown = [printable(line.rstrip("\r").rsplit("\r", 1)[-1]) for line in found]
    while shown and not shown[-1]:
        shown.pop()
    return shown[-LOG_LINES:]


def reason(error: OSError | UserError) -> str:
    """Why something cannot be read, in a sentence."""
    if isinstance(error, UserError):
        return str(error)
    return f"cannot be read: {error.strerror or error}."


def _texts(value: Any, prefix: str = "") -> dict[str, str]:
    """A mapping of plain values as texts, none of them endless."""
    if not isinstance(value, Mapping):
        return {}
    return {printable(f"{prefix}{name}"): _text(one) for name, one in list(value.items())[:1000]}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        try:
            value = json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError):
            value = str(value)
    return printable(value if len(value) <= MAX_SHOWN else f"{value[:MAX_SHOWN]}...")


def _peak(flops: float | None) -> float | None:
    """A peak that a device can have; MFU of any other would be no number."""
    return flops if flops is not None and 1e6 < flops < 1e30 else None


def _whole(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 62 else None
