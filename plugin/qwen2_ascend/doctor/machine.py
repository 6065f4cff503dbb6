"""Machine: what the checks look at."""

from __future__ import annotations

import glob
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

PROBE_SECONDS = 120

# -c puts the current folder first, where a script would have its own
_NOT_FROM_HERE = """
import sys
if sys.path and sys.path[0] == "":
    del sys.path[0]
"""


class Probe(NamedTuple):
    """The answer of a separate process, or why there is none."""

    answer: Any
    error: str | None


@dataclass(frozen=True)
class Machine:
    """A machine's files, environment and Python; tests give another root and environment."""

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    python: str = sys.executable

    def file(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def read(self, path: str) -> str:
        """The text of a file, empty when it cannot be read."""
        try:
            return self.file(path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def program(self, name: str) -> str | None:
        """The path of a program on PATH."""
        return shutil.which(name, path=self.environ.get("PATH"))

    def run(self, words: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
        """Runs a program in this environment.

        Raises:
            subprocess.TimeoutExpired: it takes longer than `seconds`.
            OSError: it cannot be started.
        """
        return subprocess.run(
            words,
            env=dict(self.environ),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )

    def probe(self, code: str) -> Probe:
        """Runs Python `code` in a process of its own; it prints one line of JSON at its end."""
        words = [self.python, "-W", "ignore", "-c", _NOT_FROM_HERE + code]
        try:
            done = self.run(words, PROBE_SECONDS)
        except subprocess.TimeoutExpired:
            return Probe({}, f"gave no answer in {PROBE_SECONDS} seconds")
        except OSError as error:
            return Probe({}, str(error))
        if done.returncode < 0:
            return Probe({}, f"crashed ({signal.Signals(-done.returncode).name})")
        try:
            return Probe(json.loads(done.stdout.splitlines()[-1]), None)
        except (IndexError, ValueError):
            return Probe({}, last_line(done.stderr) or f"exit status {done.returncode}")

    @cached_property
    def sys_path(self) -> list[str]:
        """Where this Python looks for modules, in this environment."""
        found = self.probe("import sys, json; print(json.dumps(sys.path))")
        return sys.path if found.error else list(found.answer)

    def versions(self, package: str) -> list[tuple[str, str]]:
        """(version, folder) of every installation of `package`, the one that counts first."""
        wanted = _normalized(package)
        found = {}
        for distribution in importlib.metadata.distributions(path=self.sys_path):
            if _normalized(distribution.metadata["Name"] or "") == wanted:
                folder = str(distribution.locate_file(""))
                found.setdefault(os.path.realpath(folder), (distribution.version, folder))
        return list(found.values())

    def version(self, package: str) -> str | None:
        """Version of the installation that counts, None when there is none."""
        return next((version for version, _ in self.versions(package)), None)

    @cached_property
    def davinci_devices(self) -> list[str]:
        pattern = str(self.file("/dev/davinci[0-9]*"))
        return sorted(glob.glob(pattern), key=lambda path: (len(path), path))


def last_line(text: str) -> str:
    """The last line that is not empty, or ""."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
