"""A run's --save folder: which iterations are found, kept and removed."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2_ascend.checkpoint import iteration
from qwen2_ascend.checkpoint.formats import megatron


def make(save: Path, *numbers: int, tracked: int | None = None) -> None:
    for number in numbers:
        folder = iteration.iteration_path(save, number)
        folder.mkdir(parents=True)
        (folder / megatron.MANIFEST_FILE).write_text("{}")
    if tracked is not None:
        (save / megatron.TRACKER_FILE).write_text(str(tracked))


def numbers(save: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in save.glob("iter_*"))


@pytest.mark.parametrize(
    ("keep", "last", "kept"),
    [
        (1, 8, [8, 10]),
        (2, 8, [6, 8, 10]),
        (2, 10, [8, 10]),
        (0, 8, [8, 10]),
        (-1, 8, [8, 10]),
    ],
)
def test_the_last_ones_are_kept_and_later_ones_of_an_earlier_run(tmp_path, keep, last, kept):
    make(tmp_path, 2, 4, 6, 8, 10, tracked=last)
    (tmp_path / "iter_0000003").mkdir()  # not complete: not a checkpoint of ours
    iteration.remove_older(tmp_path, keep, last)
    assert numbers(tmp_path) == sorted([3, *kept])
    assert not list(tmp_path.glob(".*"))


def test_a_run_goes_on_from_the_tracked_one_or_from_those_before(tmp_path):
    make(tmp_path, 2, 4, 6, tracked=4)
    names = [path.name for path in iteration.resumable_iterations(tmp_path)]
    assert names == ["iter_0000004", "iter_0000002"]
    (tmp_path / megatron.TRACKER_FILE).unlink()
    names = [path.name for path in iteration.resumable_iterations(tmp_path)]
    assert names == ["iter_0000006", "iter_0000004", "iter_0000002"]


def test_what_a_killed_run_left_is_put_right(tmp_path):
    make(tmp_path, 2)
    for left in (".iter_0000004.partial", ".iter_0000002.removed", ".iter_0000002.replaced"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "file").write_text("")
    (tmp_path / ".iter_0000006.replaced").mkdir()
    (tmp_path / "other").mkdir()
    iteration.recover(tmp_path)
    assert numbers(tmp_path) == [2, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iter_0000002",
        "iter_0000006",
        "other",
    ]
