"""Which tests a run takes: of a file that takes long, as many as fit into its seconds.

    pytest                        # of each file what takes SECONDS; the commit chooses which tests
    pytest --all                  # everything
    pytest tests/x/test_y.py      # everything in it
    pytest --seconds 8 FILES      # of each of these what takes 8 seconds

durations.json has the seconds of one case of each test function; what it does not have counts as
quick. `--store-durations` writes what a run has measured. What is left out is counted as
deselected.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")

HERE = Path(__file__).parent
DURATIONS = HERE / "durations.json"
SECONDS = 4
"""The seconds of each file, in one process on a quiet machine."""
QUICK = 0.25
"""Seconds below which a case is neither stored nor left out."""
SEED = "TEST_SEED"
"""Environment variable that chooses the part instead of the commit."""
PAIRS_SEED = "PAIRS_SEED"
"""The seed of the tests that choose for themselves: which flags meet, where a run is killed."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="every test, not a part of long files")
    parser.addoption("--seconds", type=float, help="of each file, what takes so long")
    parser.addoption("--store-durations", action="store_true", help=f"write {DURATIONS.name}")


def pytest_configure(config: pytest.Config) -> None:
    os.environ[SEED] = seed()  # for pytest-xdist's processes too: HEAD may move
    os.environ.setdefault(PAIRS_SEED, str(int(_digest(seed())[:6], 16)))
    if config.getoption("--store-durations") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Stopwatch())


def takes_all(config: pytest.Config) -> bool:
    """Whether a run leaves nothing out: it is told to, or tests were named."""
    is_whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    named = bool(config.getoption("keyword")) or not is_whole
    return config.getoption("--all") or (named and config.getoption("--seconds") is None)


@pytest.fixture(scope="session")
def a_third(pytestconfig: pytest.Config) -> Callable[[Sequence[T]], Sequence[T]]:
    """Of many small cases every third, for tests with `every_commit`; the commit says which.

    All of them where nothing is left out.
    """
    if takes_all(pytestconfig):
        return lambda cases: cases
    return lambda cases: cases[int(_digest(seed())[:8], 16) % 3 :: 3]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seconds = config.getoption("--seconds")
    if takes_all(config):
        return
    chosen, costs = seed(), stored_durations()
    files: dict[Path, list[pytest.Item]] = defaultdict(list)
    for item in items:
        files[item.path].append(item)
    limit = SECONDS if seconds is None else seconds
    kept = {id(item) for cases in files.values() for item in part(cases, costs, limit, chosen)}
    left_out = [item for item in items if id(item) not in kept]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if id(item) in kept]


def part(
    items: Sequence[pytest.Item], costs: Mapping[str, float], seconds: float, chosen: str
) -> list[pytest.Item]:
    """What a run takes of a file: all that is quick, and of the rest as much as fits.

    What is marked `every_commit` chooses its own part.

    The functions take turns, in an order that `chosen` mixes as it does their cases. A case that
    takes n times as long as there is time is taken by one commit in n, when its turn is first.
    """
    taken = {
        id(item)
        for item in items
        if costs.get(family(item.nodeid), 0) < QUICK or item.get_closest_marker("every_commit")
    }
    functions: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in sorted(items, key=lambda item: _digest(f"{chosen} {item.nodeid}")):
        if id(item) not in taken:
            functions[family(item.nodeid)].append(item)
    turns = [item for cases in zip_longest(*functions.values()) for item in cases if item]
    left = seconds
    for item in turns:
        cost = costs[family(item.nodeid)]
        luck = int(_digest(f"{item.nodeid} {chosen}")[:8], 16) / 16**8
        if cost <= left or (left == seconds and luck * cost < seconds):
            taken.add(id(item))
            left -= cost
    return [item for item in items if id(item) in taken]


def family(nodeid: str) -> str:
    """The file and the function of a test, without its parameters."""
    return nodeid.partition("[")[0]


def stored_durations() -> dict[str, float]:
    """Seconds of one case, by `family`."""
    return json.loads(DURATIONS.read_text(encoding="utf-8"))


def seconds_of(items: Iterable[pytest.Item], costs: Mapping[str, float]) -> float:
    """What all these tests take together."""
    return sum(costs.get(family(item.nodeid), 0.0) for item in items)


class Stopwatch:
    """Writes down how long each function's cases took, in the process that hears of all tests."""

    def __init__(self) -> None:
        self._seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.skipped:
            self._seconds[family(report.nodeid)][report.nodeid] += report.duration

    def pytest_sessionfinish(self) -> None:
        found = {name: sum(cases.values()) / len(cases) for name, cases in self._seconds.items()}
        rounded = {name: round(mean, 1) for name, mean in found.items() if mean >= QUICK}
        others = {name: mean for name, mean in stored_durations().items() if name not in found}
        text = json.dumps(others | rounded, indent=0, sort_keys=True)
        DURATIONS.write_text(text + "\n", encoding="utf-8")


def wanted_checks(items: Iterable[pytest.Item]) -> dict[Path, set[str]]:
    """Names of the distributed checks (distributed/harness.py) that these tests ask for."""
    wanted: dict[Path, set[str]] = {}
    for item in items:
        worker = getattr(getattr(item, "module", None), "WORKER", None)
        check = getattr(item, "callspec", None) and item.callspec.params.get("check")  # type: ignore
        if isinstance(worker, Path) and hasattr(check, "world_size"):
            wanted.setdefault(worker, set()).add(check.name)
    return wanted


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


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
