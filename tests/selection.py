"""Which tests a run takes: all of them with --all, otherwise of costly families a part.

    @pytest.mark.one_in(3)      # of this test's cases, a third; which one depends on the commit

Whoever names a test (`-k`, `file.py::test`) gets it. What is left out is counted as deselected.
`--one-in 3` takes a third of all distributed tests' cases, of named ones too: for a run beside a
whole one, with another release of megatron-core.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SEEDS = ("QWEN2_CRASH_SEED", "PAIRS_SEED")
"""Of tests that choose their own part: where a run is killed, which flags meet."""
SEED = "TEST_SEED"
"""Environment variable that chooses the part instead of the commit."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="every test, not a part of the costly ones")
    parser.addoption(
        "--one-in", type=int, default=1, metavar="N", help="of distributed tests' cases one in N"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "one_in(n): of its cases, one in n is run; all with --all")
    if config.getoption("--all"):
        os.environ.setdefault("QWEN2_CRASH_POINTS", "all")
    number = str(int(_digest(seed())[:6], 16))
    for name in SEEDS:
        os.environ.setdefault(name, number)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    least, named = config.getoption("--one-in"), is_named(config)
    if config.getoption("--all") or (named and least == 1):
        return
    chosen = seed()
    left_out = {
        id(item)
        for (_, n), cases in groupby(items, key=lambda item: _family(item, least, named))
        if n > 1
        for item in left_over(list(cases), n, chosen)
    }
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if id(item) in left_out])
        items[:] = [item for item in items if id(item) not in left_out]


def wanted_checks(items: Iterable[pytest.Item]) -> dict[Path, set[str]]:
    """Names of the distributed checks (distributed/harness.py) that these tests ask for."""
    wanted: dict[Path, set[str]] = {}
    for item in items:
        worker = getattr(getattr(item, "module", None), "WORKER", None)
        check = getattr(item, "callspec", None) and item.callspec.params.get("check")  # type: ignore
        if isinstance(worker, Path) and hasattr(check, "world_size"):
            wanted.setdefault(worker, set()).add(check.name)
    return wanted


def is_named(config: pytest.Config) -> bool:
    """Whether somebody asked for certain tests, not for files or folders of them."""
    return bool(config.getoption("keyword")) or any("::" in name for name in config.args)


def seed() -> str:
    """What chooses: TEST_SEED, or the commit; the same in every process of a run."""
    if given := os.environ.get(SEED):
        return given
    command = ["git", "-C", str(HERE), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "none"  # there is no git
    return done.stdout.strip() or "none"


def left_over(cases: Sequence[pytest.Item], n: int, chosen: str) -> list[pytest.Item]:
    """All but one in n of the cases, rounded up, in an order that `chosen` mixes."""
    mixed = sorted(cases, key=lambda item: _digest(f"{chosen} {item.nodeid}"))
    return mixed[-(-len(cases) // n) :]


def _family(item: pytest.Item, least: int, named: bool) -> tuple[str, int]:
    marker = None if named else item.get_closest_marker("one_in")
    n = marker.args[0] if marker else 1
    if item.get_closest_marker("distributed"):
        n = max(n, least)
    return item.nodeid.partition("[")[0], n


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
