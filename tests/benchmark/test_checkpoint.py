"""`qwen2-ascend benchmark checkpoint`: the arithmetic of its report, and a run of it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from helpers import tiny_config
from qwen2_ascend.benchmark import checkpoint
from qwen2_ascend.errors import UserError
from qwen2_ascend.planning.parameters import num_parameters


def answer(save: float, load: float, num_bytes: int, *, intact: bool = True) -> dict:
    return {
        "save": {"seconds": save, "memory_bytes": 5},
        "load": {"seconds": load, "memory_bytes": 7},
        "num_bytes": num_bytes,
        "intact": intact,
    }


def test_figures_follow_from_the_seconds() -> None:
    options = checkpoint.CheckpointBenchmark(sides=("ours", "torch.save"))
    answers = {
        "ours": [answer(2.0, 1.0, 100), answer(4.0, 1.0, 100)],
        "torch.save": [answer(1.0, 3.0, 80), answer(2.0, 0.5, 80, intact=False)],
    }
    report = checkpoint.summarize(options, answers)
    assert report["ours"]["save"]["bytes_per_second"] == [50.0, 25.0]
    assert report["torch.save"]["save"]["first_over_it"] == [0.5, 0.5]
    assert report["torch.save"]["load"]["first_over_it"] == [3.0, 0.5]
    assert report["ours"]["load"]["memory_bytes"] == 7
    assert report["ours"]["intact"] and not report["torch.save"]["intact"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [1, 2])
def test_every_side_gets_back_what_it_saved(
    processes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = tiny_config(num_layers=2)
    (tmp_path / "config.json").write_text(json.dumps(tiny.to_hugging_face()), encoding="utf-8")
    checkpoint.run(
        checkpoint.CheckpointBenchmark(
            config=str(tmp_path / "config.json"),
            rounds=1,
            processes=processes,
            directory=tmp_path,
            json=tmp_path / "out.json",
        )
    )
    report = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert set(report) == set(checkpoint.SIDES if processes == 1 else checkpoint.RANKED_SIDES)
    for row in report.values():
        assert row["intact"] and row["num_bytes"] > 12 * num_parameters(tiny)
    assert "| ours-async |" in capsys.readouterr().out
    if processes > 1:
        own = report["ours"]["rank_bytes"].values()
        assert len(own) == processes and max(own) < 1.5 * min(own), own


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(UserError) as refused:
        checkpoint.run(checkpoint.CheckpointBenchmark(dtype="int8", sides=("cp",), rounds=0))
    for words in ("--dtype int8", "--sides cp", "--rounds 0"):
        assert words in str(refused.value)


@pytest.mark.parametrize(
    ("signal_number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=str
)
def test_nothing_is_left_by_a_run_that_is_told_to_stop(
    tmp_path: Path, signal_number: signal.Signals, status: int
) -> None:
    command = [sys.executable, "-m", "qwen2_ascend.cli", "benchmark", "checkpoint"]
    with subprocess.Popen([*command, "--directory", str(tmp_path)]) as process:
        try:
            children: list[psutil.Process] = []
            while not children and process.poll() is None:
                time.sleep(0.05)
                children = psutil.Process(process.pid).children(recursive=True)
            assert [path.name for path in tmp_path.glob("qwen2-benchmark-*")]
            process.send_signal(signal_number)
            assert process.wait(60) == status
        finally:
            process.kill()
    assert not list(tmp_path.iterdir())
    assert not psutil.wait_procs(children, timeout=10)[1]
