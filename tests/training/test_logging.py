"""What a run reports: figures, files, and what happens without the optional packages."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from logs import logged_lines
from qwen2_ascend.training import logging
from qwen2_ascend.training.logging import Reporter, Step, draw_loss
from qwen2_ascend.training.planned import Expected


def step(iteration: int, **changes) -> Step:
    plain = Step(
        iteration=iteration,
        consumed_samples=8 * iteration,
        loss=4.0 / iteration,
        grad_norm=1.5,
        lr=1e-3,
        num_tokens=100,
        seconds=0.5,
        updated=True,
        loss_scale=1.0,
        peak_memory_bytes=3 * 2**30,
    )
    return plain._replace(**changes)


@pytest.fixture
def lines() -> Iterator[list[str]]:
    with logged_lines() as found:
        yield found


def reporter(**changes) -> Reporter:
    plain = dict(
        train_iters=4,
        first_iteration=0,
        log_interval=2,
        tokens_per_step=1000,
        flops_per_step=4e12,
        world_size=2,
    )
    return Reporter(**{**plain, **changes})


def rows(folder: Path) -> list[dict]:
    """Every line, which all have to be whole."""
    text = (folder / logging.METRICS_FILE).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_one_line_per_interval_with_every_figure(lines: list[str]) -> None:
    report = reporter()
    report.step(step(1))
    assert lines == []
    report.step(step(2, num_tokens=300, seconds=1.5))
    # (4.0 * 100 + 2.0 * 300) / 400 nats; 1000 tokens and 4e12 operations in a second, on 2 devices
    assert lines == [
        "iteration 2/4 | loss 2.5000 | grad norm 1.500 | lr 1.000e-03 | 1,000 tokens/s | "
        "2 TFLOP/s/device | 1.000 s/step | peak 3.00 GiB"
    ]


def test_the_first_steps_are_set_beside_the_plan_once(lines: list[str]) -> None:
    """The very first is left out; the median of the next four counts; one more line at the end."""
    planned = Expected("910B3", 0.8, 4 * 2**30)
    report = reporter(train_iters=8, log_interval=1, planned=planned)
    for iteration, seconds in enumerate((30.0, 1.0, 1.0, 0.9, 7.0, 1.0, 1.0), start=1):
        report.step(step(iteration, seconds=seconds))
    report.close()
    told = [line for line in lines if "planned" in line]
    assert told == [
        "steps 2 to 5 measured: 1.000 s/step (+25%), 3.00 GiB (-25%) | planned for 910B3: "
        "0.800 s/step, 4.00 GiB (docs/planning.md)"
    ]
    assert lines.index(told[0]) == 5, "after the lines of the five first steps"


def test_a_short_run_says_at_its_end_what_was_planned(lines: list[str]) -> None:
    report = reporter(log_interval=1, planned=Expected("910B3", 0.5, 2**30))
    report.step(step(1))
    report.step(step(2, peak_memory_bytes=None))
    report.close()
    assert lines[-1] == (
        "step 2 measured: 0.500 s/step (+0%) | planned for 910B3: 0.500 s/step (docs/planning.md)"
    )
    lines.clear()
    report = reporter(log_interval=1, planned=Expected("910B3", 0.5, 2**30))
    report.step(step(1))
    report.close()
    assert len(lines) == 1, "a first step alone says nothing"


def test_no_figure_of_a_device_is_told_that_is_not_there(lines: list[str], tmp_path: Path) -> None:
    """A simulated one has none: neither in the line nor in the files."""
    report = reporter(log_interval=1, flops_per_step=None, report_dir=tmp_path)
    report.step(step(1, peak_memory_bytes=None))
    assert "TFLOP/s" not in lines[0] and "GiB" not in lines[0]
    assert not {"tflops_per_device", "peak_memory_bytes"} & set(rows(tmp_path)[0])


def test_skipped_steps_and_the_loss_scale_are_shown(lines: list[str]) -> None:
    report = reporter()
    report.step(step(1, loss=math.nan, grad_norm=math.nan, updated=False, loss_scale=1024.0))
    report.step(step(2, loss_scale=512.0))
    assert lines[0].endswith("loss scale 512 | 1 skipped")
    assert "loss 2.0000" in lines[0], "a loss that is not finite does not spoil the mean"


def test_metrics_go_into_json_lines_and_a_picture(lines: list[str], tmp_path: Path) -> None:
    report = reporter(report_dir=tmp_path, log_interval=1)
    for iteration in range(1, 4):
        report.step(step(iteration))
    report.step(step(4, loss=math.inf))
    report.validation(4, 1.25)
    report.close()
    found = rows(tmp_path)
    assert [row["iteration"] for row in found] == [1, 2, 3, 4, 4]
    assert found[3]["loss"] is None and found[4]["validation_loss"] == 1.25
    picture = (tmp_path / logging.PICTURE_FILE).read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    assert any("validation loss 1.2500 | perplexity 3.49" in line for line in lines)


def test_a_resumed_run_continues_the_curve(tmp_path: Path) -> None:
    first = reporter(report_dir=tmp_path, log_interval=1)
    for iteration in range(1, 4):
        first.step(step(iteration))
    with (tmp_path / logging.METRICS_FILE).open("a", encoding="utf-8") as file:
        file.write('{"iteration": 4, "lo')  # killed while writing
    second = reporter(report_dir=tmp_path, log_interval=1, first_iteration=2)
    second.step(step(3, loss=9.0))
    assert [(row["iteration"], row["loss"]) for row in rows(tmp_path)] == [
        (1, 4.0),
        (2, 2.0),
        (3, 9.0),
    ]


def test_metrics_that_cannot_be_written_are_missed_once_and_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / logging.METRICS_FILE).mkdir()
    report = reporter(report_dir=tmp_path, log_interval=1)
    report.step(step(1))
    report.step(step(2))
    told = capsys.readouterr().err
    assert told.count("metrics.jsonl is not complete: ") == 1 and len(told.splitlines()) == 1
    (tmp_path / logging.METRICS_FILE).rmdir()
    report.step(step(3))
    assert [row["iteration"] for row in rows(tmp_path)] == [3]


def test_a_line_cut_short_does_not_spoil_the_next(tmp_path: Path) -> None:
    report = reporter(report_dir=tmp_path, log_interval=1)
    report.step(step(1))
    with (tmp_path / logging.METRICS_FILE).open("a", encoding="utf-8") as file:
        file.write('{"iteration": 2, "lo')  # a full disk
    report.step(step(3))
    report.close()
    kept = [row["iteration"] for _, row in logging._rows(tmp_path / logging.METRICS_FILE)]
    assert kept == [1, 3]
    assert (tmp_path / logging.PICTURE_FILE).exists()


def test_other_ranks_are_silent(lines: list[str], tmp_path: Path) -> None:
    report = reporter(report_dir=tmp_path, tensorboard_dir=tmp_path, silent=True)
    report.interrupt("hello")
    report.step(step(4))
    report.close()
    assert lines == [] and list(tmp_path.iterdir()) == []


def test_tensorboard_has_the_losses_each_under_its_own_name(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report = reporter(tensorboard_dir=tmp_path)
    report.step(step(1))
    report.step(step(2))
    report.validation(2, 1.5)
    report.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    (loss,) = events.Scalars("train/loss")
    assert (loss.step, loss.value) == (2, 3.0)
    (loss,) = events.Scalars("validation/loss")
    assert (loss.step, loss.value) == (2, 1.5)
    assert not [tag for tag in events.Tags()["scalars"] if tag.startswith("train/validation")]


def test_tensorboard_drops_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = reporter(tensorboard_dir=tmp_path, log_interval=1)
    for iteration in range(1, 5):
        first.step(step(iteration))
    first.validation(4, 1.5)
    first.close()
    second = reporter(tensorboard_dir=tmp_path, log_interval=1, first_iteration=2)
    second.step(step(3, loss=9.0))
    second.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(1, 4.0), (2, 2.0), (3, 9.0)]
    assert not events.Scalars("validation/loss")


def test_without_the_report_extra_one_line_says_so(
    lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    report = reporter(report_dir=tmp_path, tensorboard_dir=tmp_path / "events")
    report.step(step(4))
    report.close()
    assert sum("not installed" in line for line in lines) == 2
    assert not (tmp_path / logging.PICTURE_FILE).exists()
    assert rows(tmp_path)[0]["iteration"] == 4


def test_no_metrics_no_picture(tmp_path: Path) -> None:
    draw_loss(tmp_path / "none.jsonl", tmp_path / "none.png")
    assert list(tmp_path.iterdir()) == []
