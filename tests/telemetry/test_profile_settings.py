"""What cannot be profiled is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2_ascend.training.settings import PretrainSettings, parse

GOOD = "--mock-data --seq-length 32 --train-iters 20 --lr 1e-3"


def settings(flags: str) -> PretrainSettings:
    return parse(f"{GOOD} {flags}".split())


@pytest.mark.parametrize(
    ("flags", "window"),
    [
        ("", None),
        ("--profile-steps 3:5", (3, 5)),
        ("--profile", (10, 12)),
        ("--profile --profile-step-start 11", (11, 12)),
        ("--profile --profile-step-start 0 --profile-step-end 1", (0, 1)),
        ("--profile_step_start 3 --profile_step_end 5", None),
    ],
)
def test_megatrons_flags_and_the_short_one_mean_the_same(flags: str, window: object) -> None:
    assert settings(flags).profile.window() == window


def test_mindspeed_llms_name_of_the_folder_is_taken_too() -> None:
    chosen = settings("--profile --profile-ranks 0 3 --profile-save-path x").profile
    assert (chosen.profile_ranks, chosen.folder(Path("run"))) == ((0, 3), Path("x"))
    assert settings("--profile").profile.folder(Path("run")) == Path("run/profile")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--profile-steps 12", "--profile-steps 12 is not START:END"),
        ("--profile-steps -1:2", "is not START:END"),
        ("--profile-steps 5:5", "the end must be above the start"),
        ("--profile --profile-step-start 12", "the end must be above the start"),
        ("--profile-steps 19:21", "from step 19 to 21: the run has 20 steps"),
        ("--profile-steps 1:2 --profile-step-end 4", "give one"),
        ("--profile-steps 1:2 --profile-ranks 0 2", "--profile-ranks 2: the ranks are 0 to 1"),
    ],
)
def test_what_cannot_be_recorded_is_refused(flags: str, words: str, tmp_path: Path) -> None:
    chosen = settings(flags)
    found = chosen.profile.faults(2, chosen.batch.train_iters, tmp_path)
    assert len(found) == 1 and words in found[0], found


def test_a_trace_needs_a_folder_that_can_be_written(tmp_path: Path) -> None:
    profile = settings("--profile-steps 1:2").profile
    assert "where would the trace go" in profile.faults(1, 20, None)[0]
    (tmp_path / "file").touch()
    assert f"{tmp_path}/file is no folder" in profile.faults(1, 20, tmp_path / "file" / "run")[0]
    assert profile.faults(1, 20, tmp_path / "not" / "yet" / "there") == []
    assert list(tmp_path.iterdir()) == [tmp_path / "file"], "asking makes nothing"


@pytest.mark.parametrize(
    "flag",
    [
        "--profile-dir x",
        "--profile-step-start 0",
        "--profile-step-end 5",
        "--profile-ranks 0 1",
        "--profile-record-shapes",
        "--profile-with-memory",
        "--profile-with-stack",
        "--profile-level level1",
    ],
)
def test_how_to_record_is_nothing_without_what(flag: str) -> None:
    (found,) = settings(flag).profile.faults(2, 20, Path("run"))
    assert found.startswith(f"{flag.split()[0]} needs --profile-steps, as in 10:12, or --profile")
    assert settings("").profile.faults(2, 20, Path("run")) == []


def test_the_length_of_the_run_may_be_known_later() -> None:
    profile = settings("--profile-steps 100:102").profile
    assert profile.faults(1, None, Path("x")) == []
    assert "the run has 50 steps" in profile.range_faults(50)[0]
