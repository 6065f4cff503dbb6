"""Progress: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from tqdm import tqdm


def size_text(num_bytes: int) -> str:
    """A size for a log: 3.09 GB, 12.4 MB."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 10**8 else f"{num_bytes / 1e6:.1f} MB"


def progress_bar(total: int, unit: str, initial: int = 0, what: str | None = None) -> Any:
    """A bar of tqdm's on a terminal; None where stderr is a log.

    Args:
        total: how many units there are.
        unit: "B" for bytes, which are shown as kB, MB and so on; or a word.
        initial: how many of them are done already.
        what: words before the bar.
    """
    if not sys.stderr.isatty():
        return None

    options: Any = {"dynamic_ncols": True, "leave": False, "unit_scale": unit == "B"}
    return tqdm(desc=what, total=total, initial=initial, unit=unit, **options)


class Progress:
    """Context manager to be called with the bytes of each piece of work that is done."""

    def __init__(self, what: str, total_bytes: int, *, seconds_per_line: float = 10.0) -> None:
        self._what, self._total = what, total_bytes
        self._done = 0
        self._lock = threading.Lock()
        self._bar = None
        self._every = seconds_per_line
        self._started = self._said = time.monotonic()

    def __enter__(self) -> Progress:
        self._bar = progress_bar(self._total, "B", what=self._what)
        return self

    def __call__(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            if self._bar is not None:
                self._bar.update(num_bytes)
            elif self._done < self._total and time.monotonic() - self._said >= self._every:
                self._said = time.monotonic()
                self._line()

    def _line(self) -> None:
        seconds = time.monotonic() - self._started
        percent = 100 * self._done / max(self._total, 1)
        print(
            f"{self._what}: {percent:3.0f}% of {size_text(self._total)}, "
            f"{self._done / 1e9 / max(seconds, 1e-9):.2f} GB/s",
            file=sys.stderr,
            flush=True,
        )

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if kind is None:
            self._line()
