"""What the board's folders hold: runs, reports of precision, models, files of chats.

The walk is bounded: it goes MAX_DEPTH folders deep, looks at MAX_FOLDERS folders, follows no link,
and does not go into checkpoints.
"""

from __future__ import annotations

import os
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from qwen2_ascend.board.jail import Jail

METRICS_FILE = "metrics.jsonl"
REPORT_FILE = "report.json"
MAX_DEPTH = 6
MAX_FOLDERS = 20_000
MAX_FOUND = 2_000
"""How many runs, and how many reports, are listed at most."""
FRESH_SECONDS = 2.0
"""A listing is used again for so long."""
DATA = (".jsonl", ".json", ".parquet")
OTHER_JSON = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|vocab|added_tokens|"
    r"adapter_config|metadata|report|run|qwen2_ascend_manifest|model\.safetensors\.index)\.json"
)
_SKIPPED = re.compile(r"\.|iter_\d+$|release$|node_modules$|__pycache__$|cache$")


@dataclass(kw_only=True)
class Listing:
    """Paths, each kind in the order of their names."""

    runs: list[Path] = field(default_factory=list)
    """Folders with a metrics.jsonl."""
    reports: list[Path] = field(default_factory=list)
    """Files that align_qwen2.py's --report has written."""
    models: list[Path] = field(default_factory=list)
    """Folders that --load may name: a model of Hugging Face's, shards, a training checkpoint."""
    data: list[Path] = field(default_factory=list)
    """Files that may hold chats."""
    is_cut: bool = False
    """Whether there is more than was looked at."""


class Lister:
    """Lists the folders of a jail, and not more often than every FRESH_SECONDS."""

    def __init__(self, jail: Jail) -> None:
        self._jail = jail
        self._lock = threading.Lock()
        self._listing: Listing | None = None
        self._time = 0.0

    def __call__(self) -> Listing:
        with self._lock:
            if self._listing is None or time.monotonic() - self._time > FRESH_SECONDS:
                self._listing = list_folders(self._jail)
                self._time = time.monotonic()
            return self._listing


def list_folders(jail: Jail) -> Listing:
    """What is below the jail's folders now."""
    listing, left = Listing(), MAX_FOLDERS
    for root in jail.roots.values():
        for folder, names, files in os.walk(root):
            left -= 1
            depth = len(Path(folder).relative_to(root).parts)
            if left <= 0 or depth >= MAX_DEPTH:
                listing.is_cut |= left <= 0 or bool(names)
                names.clear()
            names[:] = sorted(name for name in names if not _SKIPPED.match(name))
            _sort(jail, Path(folder), set(files), listing)
            if left <= 0:
                break
    return listing


def _sort(jail: Jail, folder: Path, files: set[str], listing: Listing) -> None:
    """Enters a folder and its files into the lists that they belong to."""

    def enter(found: list[Path], path: Path, file: Path) -> None:
        if len(found) >= MAX_FOUND:
            listing.is_cut = True
        elif not file.is_symlink() or jail.holds(file):
            found.append(path)

    if METRICS_FILE in files:
        enter(listing.runs, folder, folder / METRICS_FILE)
    if REPORT_FILE in files:
        enter(listing.reports, folder / REPORT_FILE, folder / REPORT_FILE)
    is_model = "config.json" in files and any(name.endswith(".safetensors") for name in files)
    if is_model or "latest_checkpointed_iteration.txt" in files:
        enter(listing.models, folder, folder / "config.json")
    for name in sorted(files):
        if name.endswith(DATA) and name != METRICS_FILE and not OTHER_JSON.fullmatch(name):
            enter(listing.data, folder / name, folder / name)
