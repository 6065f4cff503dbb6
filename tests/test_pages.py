"""Links of the pages that users read: the file and the heading that each names are there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")]
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PROMISED = {"migration.md", "migration.zh-CN.md", "interop.md"}
"""Pages that other changes bring."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert not list(broken(page))


def broken(page: Path) -> Iterator[str]:
    """The links of a page to files or headings that are not there."""
    for target in LINK.findall(without_commands(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, heading = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists():
            if file.name not in PROMISED:
                yield target
        elif heading and heading not in anchors(file):
            yield target


def anchors(page: Path) -> set[str]:
    """The headings of a page as links spell them: lower case, hyphens, no punctuation."""
    headings = re.findall(r"^#+ (.+)$", without_commands(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def without_commands(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
