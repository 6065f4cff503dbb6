"""Which tests a run takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from selection import family, part

COSTS = {"f.py::quick": 0.1, "f.py::some": 2.0, "f.py::long": 40.0}


def items(**cases: int) -> Any:
    return [
        SimpleNamespace(nodeid=f"f.py::{name}[{number}]", get_closest_marker={}.get)
        for name, count in cases.items()
        for number in range(count)
    ]


def names(taken: Any) -> list[str]:
    return [family(item.nodeid).partition("::")[2] for item in taken]


def test_what_fits_is_taken_and_all_that_is_quick() -> None:
    taken = names(part(items(quick=50, unknown=5, some=20), COSTS, 6, "a commit"))
    assert (taken.count("quick"), taken.count("unknown"), taken.count("some")) == (50, 5, 3)


def test_what_chooses_inside_is_always_taken() -> None:
    every = items(long=4, some=20)
    for item in every[:2]:
        item.get_closest_marker = {"every_commit": True}.get
    taken = part(every, COSTS, 6, "a commit")
    assert taken[:2] == every[:2]
    assert names(taken).count("some") in (0, 3), "its seconds are not those of the others"


def test_commits_choose_and_reach_every_case() -> None:
    every = items(some=20)
    chosen = [{item.nodeid for item in part(every, COSTS, 6, str(n))} for n in range(100)]
    assert chosen[0] != chosen[1]
    assert chosen[0] == {item.nodeid for item in part(every, COSTS, 6, "0")}
    assert set.union(*chosen) == {item.nodeid for item in every}


def test_a_case_that_takes_longer_is_taken_by_one_commit_in_several() -> None:
    taken = sum("long" in names(part(items(long=1), COSTS, 6, str(n))) for n in range(1000))
    assert 100 < taken < 200  # 6 seconds of 40
