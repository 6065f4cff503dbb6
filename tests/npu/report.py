"""The report of a run on hardware: what it ran on, and every check with its figures and its time.

It holds versions, the chip's name and figures, and no path, host or user name, so that it can be
sent to anybody.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

PACKAGES = ("qwen2-ascend", "torch", "torch_npu", "megatron-core", "mindspeed", "transformers")
PACKAGES += ("numpy",)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One test and what it measured."""

    name: str
    outcome: str
    """passed, failed or skipped."""
    seconds: float
    figures: Mapping[str, float | str] = field(default_factory=dict)
    message: str = ""
    """Why it failed or was skipped."""


def write(folder: Path, facts: Mapping[str, Any], checks: Sequence[Check]) -> str:
    """Writes report.json and report.txt into `folder`; returns the text."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = {
        "written": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "machine": dict(facts),
        "checks": [asdict(check) for check in checks],
    }
    (folder / "report.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    text = as_text(facts, checks)
    (folder / "report.txt").write_text(text, encoding="utf-8")
    return text


def as_text(facts: Mapping[str, Any], checks: Sequence[Check]) -> str:
    """The report for eyes: a line per fact, a line per check, and the count."""
    lines = [f"{name}: {value}" for name, value in facts.items()]
    lines += [""] if facts else []
    width = max((len(check.name) for check in checks), default=0)
    for check in checks:
        figures = " ".join(f"{name}={_figure(value)}" for name, value in check.figures.items())
        line = f"{check.outcome:<7}  {check.name:<{width}}  {check.seconds:7.1f} s  {figures}"
        lines.append(line.rstrip())
        if check.message:
            lines.append(f"{'':<9}{check.message}")
    counts = {name: sum(check.outcome == name for check in checks) for name in _OUTCOMES}
    lines += ["", ", ".join(f"{count} {name}" for name, count in counts.items())]
    return "\n".join(lines) + "\n"


_OUTCOMES = ("passed", "failed", "skipped")


def _figure(value: float | str) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def anonymous(text: str, limit: int = 300) -> str:
    """The first line, without the folders of any path."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    return re.sub(r"(?:/[\w.@+-]+)+/", ".../", line)[:limit]


# --- what it ran on -------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version(), "architecture": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
