"""metrics.jsonl as a page reads it: on from where it was left, bounded, whatever the file holds."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2_ascend.board import metrics, reading
from qwen2_ascend.board.metrics import CAPACITY, MetricsFile, last_rows, parse_lines
from qwen2_ascend.training.logging import Reporter, Step


def line(iteration: int, **values: Any) -> str:
    return json.dumps({"iteration": iteration, "loss": 1.0 / iteration, **values}) + "\n"


def write(path: Path, iterations: range, **values: Any) -> None:
    path.write_text("".join(line(i, **values) for i in iterations))


def read(path: Path) -> MetricsFile:
    file = MetricsFile(path)
    file.update()
    return file


def shown(file: MetricsFile, name: str = "loss") -> list[tuple[int, float]]:
    return [(point.iteration, point.mean) for point in file.buckets.points(name)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_what_a_training_log_writes_is_what_is_shown(tmp_path: Path) -> None:
    reporter = Reporter(
        train_iters=3,
        first_iteration=0,
        log_interval=1,
        tokens_per_step=128,
        flops_per_step=1e9,
        world_size=1,
        report_dir=tmp_path,
    )
    for iteration, loss in enumerate((3.0, float("inf"), 2.0), 1):
        reporter.step(
            Step(
                iteration=iteration,
                consumed_samples=iteration,
                loss=loss,
                grad_norm=1.0,
                lr=1e-4,
                num_tokens=128,
                seconds=0.5,
                updated=True,
                loss_scale=1.0,
                peak_memory_bytes=1 << 30,
            )
        )
    reporter.validation(3, 2.5)
    file = read(tmp_path / "metrics.jsonl")
    assert shown(file) == [(1, 3.0), (3, 2.0)]  # no point for what is not finite
    assert shown(file, "validation_loss") == [(3, 2.5)]
    assert shown(file, "tokens_per_second") == [(1, 256.0), (2, 256.0), (3, 256.0)]
    assert not file.num_bad_lines and file.error is None


def test_a_file_that_grows_is_read_on_and_not_again(path: Path, monkeypatch) -> None:
    write(path, range(1, 101))
    file = read(path)
    sizes: list[int] = []
    pread, mine = os.pread, threading.get_ident()

    def counted(fd: int, size: int, offset: int) -> bytes:
        if threading.get_ident() == mine:  # other tests' readers go on
            sizes.append(size)
        return pread(fd, size, offset)

    monkeypatch.setattr(metrics.os, "pread", counted)
    with path.open("a") as out:
        out.write(line(101))
    file.update()
    assert shown(file)[-1] == (101, 1 / 101)
    assert sum(sizes) < 500  # the new line, and the mark before it
    revision = file.revision
    file.update()
    assert file.revision == revision  # nothing new


def test_the_end_of_a_line_that_is_being_written_is_waited_for(path: Path) -> None:
    whole = line(1) + line(2)
    path.write_text(whole[:-10])
    file = read(path)
    assert [x for x, _ in shown(file)] == [1]
    path.write_text(whole)
    file.update()
    assert [x for x, _ in shown(file)] == [1, 2]
    assert not file.num_bad_lines


def test_a_resumed_run_that_writes_its_file_anew_is_begun_anew(path: Path) -> None:
    write(path, range(1, 50))
    file = read(path)
    other = path.with_name("other")
    write(other, range(1, 60), loss=7.0)
    other.replace(path)
    file.update()
    assert shown(file)[-1] == (59, 7.0) and len(shown(file)) == 59


def test_a_file_that_is_overwritten_in_place_is_begun_anew(path: Path) -> None:
    write(path, range(1, 50))
    file = read(path)
    write(path, range(1, 90), loss=7.0)  # longer, the same inode
    file.update()
    assert set(y for _, y in shown(file)) == {7.0} and len(shown(file)) == 89
    path.write_text(line(1))
    file.update()
    assert shown(file) == [(1, 1.0)]


def test_an_iteration_that_goes_back_forgets_what_came_after_it(path: Path) -> None:
    rows = [*range(1, 30), *range(20, 25)]
    path.write_text("".join(line(i, loss=float(n)) for n, i in enumerate(rows)))
    file = read(path)
    assert [x for x, _ in shown(file)] == list(range(1, 25))
    assert shown(file)[19] == (20, 29.0)


@pytest.mark.parametrize("block", [1 << 10, 1 << 20])
def test_a_long_run_keeps_means_and_spikes_in_bounded_memory(
    path: Path, monkeypatch, block: int
) -> None:
    monkeypatch.setattr(metrics, "BLOCK_BYTES", block)
    count = 5 * CAPACITY + 17
    losses = np.random.default_rng(0).normal(3, 0.1, count)
    losses[2000] = 99.0
    path.write_text("".join(line(i, loss=float(losses[i - 1])) for i in range(1, count + 1)))
    file = read(path)
    points = file.buckets.points("loss")
    assert CAPACITY / 2 < len(points) <= CAPACITY
    # eight rows of a bucket, each independent of the blocks that the file was read in
    ends = [point.iteration for point in points]
    begin = 0
    for end, point in zip(ends, points, strict=True):
        own = losses[begin:end]
        assert point.mean == pytest.approx(own.mean())
        assert (point.low, point.high) == (own.min(), own.max())
        begin = end
    few = file.buckets.points("loss", 100)
    assert len(few) <= 100 and max(point.high for point in few) == 99.0
    assert sum(array.nbytes for array in file.buckets._series.values()) <= 2 * CAPACITY * 4 * 8


HOSTILE = {
    "binary": b"\x00\xff\xfe" * 50 + b"\n",
    "text": b"Traceback (most recent call last):\n",
    "an array": b"[1, 2]\n",
    "deep": b"[" * 100_000 + b"\n",
    "deep, short": b"[" * 5_000 + b"]" * 5_000 + b"\n",
    "endless line": b"x" * 3_000_000 + b"\n",
    "huge number": b'{"iteration": 1, "loss": ' + b"9" * 5000 + b"}\n",
    "huge iteration": b'{"iteration": 99999999999999999999, "loss": 1}\n',
    "negative iteration": b'{"iteration": -1, "loss": 1}\n',
    "fractional iteration": b'{"iteration": 1.5, "loss": 1}\n',
    "two on a line": b'{"iteration": 1}, {"iteration": 2}\n',
}


@pytest.mark.parametrize("bad", HOSTILE.values(), ids=HOSTILE)
def test_lines_that_are_no_rows_are_counted_and_left_out(path: Path, bad: bytes) -> None:
    path.write_bytes(line(1).encode() + bad + line(2).encode())
    before = path.read_bytes()
    file = read(path)
    assert shown(file) == [(1, 1.0), (2, 0.5)]
    assert file.num_bad_lines == 1
    assert file.first_bad_line is not None and len(file.first_bad_line) <= 80
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "values",
    [
        ["x", None, True, {"a": 1}, [1], 10**400, float("nan"), float("inf")],
        [True, False],
        ["1.5", "2"],
        [True, None],
    ],
)
def test_values_that_are_no_numbers_are_no_points(path: Path, values: list[Any]) -> None:
    path.write_text("".join(line(i, loss=value) for i, value in enumerate([*values, 4.5], 1)))
    file = read(path)
    assert shown(file) == [(len(values) + 1, 4.5)]
    assert not file.num_bad_lines


def test_a_file_of_endlessly_many_names_keeps_some(path: Path) -> None:
    path.write_text("".join(line(i, **{f"n{i}-{j}": 1.0 for j in range(50)}) for i in range(1, 50)))
    file = read(path)
    assert len(file.buckets.names) <= metrics.MAX_SERIES and shown(file)[-1][0] == 49


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo"])
def test_what_is_no_file_is_an_error_to_show(path: Path, kind: str) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    file = read(path)
    assert file.error and not shown(file)
    file.sample(10)
    assert file.error and not shown(file)


def test_a_sample_is_of_rows_that_are_there_and_ends_with_the_last(path: Path) -> None:
    count = 20_000
    write(path, range(1, count + 1))
    file = MetricsFile(path)
    file.sample(100)
    assert file.is_sampled and not file.is_complete
    points = shown(file)
    assert 90 <= len(points) <= 210 and points[0][0] < 300 and points[-1][0] == count
    assert all(y == 1 / x for x, y in points)
    while not file.is_complete:
        assert shown(file) == points  # until the file has been read
        file.update(100_000)
    assert not file.is_sampled and len(shown(file)) > 500


def test_the_last_rows_come_from_the_end_of_a_file(path: Path) -> None:
    rows = "".join(line(i, note="x" * 200) for i in range(1, 5000))
    path.write_text(rows + json.dumps({"iteration": 4999, "validation_loss": 2.5}) + "\n{cut")
    training, validation = last_rows(path)
    assert training is not None and training["iteration"] == 4999
    assert validation is not None and validation["validation_loss"] == 2.5


def test_a_row_and_a_line_that_is_none() -> None:
    rows, bad = parse_lines([b'{"iteration": 3}', b"", b"  ", b"{"])
    assert rows == [{"iteration": 3}] and bad == [b"{"]


def test_large_files_are_sampled_at_once_and_read_in_the_thread(tmp_path: Path) -> None:
    paths = [tmp_path / str(n) / "metrics.jsonl" for n in range(3)]
    for path in paths:
        path.parent.mkdir()
        write(path, range(1, 20_000))
    reader = reading.Reader()
    assert reader.look(paths, lambda file: file.is_sampled) == [True] * 3
    assert reader.wait(60)
    assert (
        reader.look(paths, lambda file: (file.is_sampled, shown(file)[-1][0]))
        == [(False, 19_999)] * 3
    )
    with paths[1].open("a") as out:
        out.write(line(20_000))
    assert reader.look(paths, lambda file: shown(file)[-1][0])[1] == 20_000


def test_a_file_that_goes_away_does_not_keep_the_thread_busy(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 20_000))
    reader = reading.Reader()
    reader.look([path], lambda file: None)
    path.unlink()
    assert reader.wait(30)
    time.sleep(0.05)
    assert reader.look([path], lambda file: file.error) != [None]
