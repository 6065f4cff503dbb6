"""Which steps a trace holds."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwen2_ascend.telemetry.profiling import StepProfiler


class Recorder:
    """Stands for a profiler: notes at which iteration it was called how."""

    def __init__(self) -> None:
        self.iteration = 0
        self.calls: list[tuple[str, int]] = []
        self.opened: list[tuple[int, int]] = []

    def open(self, warmup: int, active: int) -> Recorder:
        self.opened.append((warmup, active))
        return self

    def start(self) -> None:
        self.calls.append(("start", self.iteration))

    def step(self) -> None:
        self.calls.append(("step", self.iteration))

    def stop(self) -> None:
        self.calls.append(("stop", self.iteration))


def run(begin: int, end: int, *, first: int = 0, last: int = 8) -> Recorder:
    recorder = Recorder()
    recorder.iteration = first
    profiler = StepProfiler(begin, end, first, recorder.open)
    for recorder.iteration in range(first + 1, last + 1):
        profiler.step_done(recorder.iteration)
    profiler.close()
    return recorder


def test_one_step_warms_up_and_the_asked_for_are_kept() -> None:
    found = run(3, 5)
    assert found.opened == [(1, 2)], "iteration 3 warms up; 4 and 5 are kept"
    assert found.calls == [("start", 2), ("step", 3), ("step", 4), ("step", 5), ("stop", 5)]


def test_the_first_step_of_a_run_is_kept_without_warming_up() -> None:
    found = run(0, 1)
    assert found.opened == [(0, 1)]
    assert found.calls == [("start", 0), ("step", 1), ("stop", 1)]


def test_a_profiler_that_fails_is_asked_no_more() -> None:
    class Full(Recorder):
        def step(self) -> None:
            super().step()
            raise OSError("no space left")

    recorder = Full()
    profiler = StepProfiler(0, 3, 0, recorder.open)
    with pytest.raises(OSError, match="no space left"):
        profiler.step_done(1)
    profiler.step_done(2)
    profiler.close()
    assert recorder.calls == [("start", 0), ("step", 0)]


@pytest.mark.parametrize(
    ("first", "opened", "started"),
    [(2, [(1, 2)], 2), (3, [(0, 2)], 3), (4, [(0, 1)], 4), (5, [], None), (7, [], None)],
)
def test_a_resumed_run_records_what_is_left(
    first: int, opened: list[tuple[int, int]], started: int | None
) -> None:
    found = run(3, 5, first=first)
    assert found.opened == opened
    assert [at for call, at in found.calls if call == "start"] == ([started] if opened else [])
    assert [call for call, _ in found.calls].count("stop") == len(opened)


def test_a_run_that_ends_early_still_writes() -> None:
    assert run(3, 8, last=4).calls[-1] == ("stop", 4)


@pytest.mark.filterwarnings("default")
def test_a_genuine_trace_holds_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    import torch

    from qwen2_ascend.runtime.profiling import open_profiler

    folder = tmp_path / "made" / "for it"
    profiler = StepProfiler(2, 4, 0, partial(open_profiler, "cpu", folder, "rank0"))
    for iteration in range(1, 7):
        torch.ones(iteration, 4).cos()
        profiler.step_done(iteration)
    (trace,) = folder.glob("rank0.*.pt.trace.json")
    events = [event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]]
    steps = {name for name in events if name.startswith("ProfilerStep#")}
    assert len(steps) == 2, steps
    assert events.count("aten::cos") == 2


@pytest.mark.parametrize(
    ("library", "is_fine"),
    [(SimpleNamespace(aclprofInit=print), True), (SimpleNamespace(), False), (None, False)],
    ids=["whole", "older", "absent"],
)
def test_cann_is_asked_for_its_profiler(
    library: object, is_fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen2_ascend.runtime import profiling

    def load(name: str) -> object:
        if library is None:
            raise OSError(f"{name}: cannot open shared object file")
        return library

    monkeypatch.setattr(profiling.ctypes, "CDLL", load)
    assert (profiling.profiler_fault("npu") is None) == is_fine
    assert profiling.profiler_fault("cpu") is None
