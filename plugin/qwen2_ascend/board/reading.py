"""The metrics files that a page looks at: small ones are read at once, large ones in a thread.

A large file is shown by a sample of its rows until the thread has read it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from qwen2_ascend.board.metrics import MetricsFile

AT_ONCE_BYTES = 1 << 19
"""How much of a file is read while the page waits."""
SLICE_BYTES = 1 << 21
"""What the thread reads between two looks at what the page wants."""
SAMPLED_PLACES = 8000
"""The number of places of all files of one question together that are looked at."""
FEWEST_PLACES, MOST_PLACES = 40, 400
"""The least and the largest number of places of one file that are looked at."""
MAX_FILES = 400
"""The most files in memory, each with some 500 kB at most."""

T = TypeVar("T")


class Reader:
    """Keeps what was read of files, the last used MAX_FILES of them."""

    def __init__(self) -> None:
        self._files: OrderedDict[Path, MetricsFile] = OrderedDict()
        self._wanted: OrderedDict[Path, None] = OrderedDict()
        self._work = threading.Condition()
        self._thread: threading.Thread | None = None
        self._num_looking = 0
        """Pages that wait for an answer; the thread lets them go first."""

    def look(self, paths: Sequence[Path], take: Callable[[MetricsFile], T]) -> list[T]:
        """What `take` makes of each file as it is known by now; the thread reads the rest."""
        places = min(MOST_PLACES, max(FEWEST_PLACES, SAMPLED_PLACES // max(len(paths), 1)))
        with self._work:
            self._num_looking += 1
        try:
            return [self._taken(path, places, take) for path in paths]
        finally:
            with self._work:
                self._num_looking -= 1
                self._work.notify_all()
                if self._wanted and self._thread is None:
                    self._thread = threading.Thread(target=self._read, daemon=True, name="metrics")
                    self._thread.start()

    def _taken(self, path: Path, places: int, take: Callable[[MetricsFile], T]) -> T:
        with self._work:
            return take(self._current(path, places))

    def wait(self, seconds: float) -> bool:
        """Whether the thread has read all that was wanted, within that time."""
        with self._work:
            return self._work.wait_for(lambda: not self._wanted, seconds)

    def _current(self, path: Path, places: int) -> MetricsFile:
        file = self._files.get(path)
        is_new = file is None
        if file is None:
            file = self._files[path] = MetricsFile(path)
            if len(self._files) > MAX_FILES:
                self._files.popitem(last=False)
        self._files.move_to_end(path)
        if is_new and _size(path) > AT_ONCE_BYTES:
            file.sample(places)
        elif not file.is_sampled:
            file.update(AT_ONCE_BYTES)
        if not file.is_complete:
            self._wanted[path] = None
        return file

    def _read(self) -> None:
        while True:
            with self._work:
                if not self._wanted or self._num_looking:
                    self._work.notify_all()
                    self._work.wait()
                    continue
                path = next(reversed(self._wanted))
                file = self._files.get(path)
                if file is None:
                    self._wanted.pop(path)
                    continue
                file.update(SLICE_BYTES)
                if file.is_complete or file.error:
                    self._wanted.pop(path, None)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
