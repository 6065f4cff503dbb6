"""Findings: what a check says of the machine, and how all of them are printed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple


class Finding(NamedTuple):
    """One line of the report."""

    name: str
    level: Literal["ok", "note", "problem"]
    text: str
    way_out: str = ""


def ok(name: str, text: str) -> Finding:
    """All is well."""
    return Finding(name, "ok", text)


def note(name: str, text: str, way_out: str = "") -> Finding:
    """It is worth knowing and does not stop anything."""
    return Finding(name, "note", text, way_out)


def problem(name: str, text: str, way_out: str) -> Finding:
    """Something will not work."""
    return Finding(name, "problem", text, way_out)


def report(findings: Sequence[Finding]) -> str:
    """The findings as lines; a way out stands below its finding."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for name, level, text, way_out in findings:
        mark = "PROBLEM" if level == "problem" else level
        lines.append(f"{mark:<7}  {name:<{width}}  {text}")
        if way_out:
            indent = " " * (width + 11)
            lines.append(f"{indent}-> " + way_out.replace("\n", f"\n{indent}   "))
    count = sum(finding.level == "problem" for finding in findings)
    return "\n".join([*lines, "", f"{count} problem(s) found" if count else "no problem found"])
