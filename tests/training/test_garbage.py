"""--manual-gc: Python's garbage is collected after the steps that the flags name, not elsewhere."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from qwen2_ascend.training.garbage import ManualCollection
from qwen2_ascend.training.settings import RuntimeSettings


@pytest.fixture
def collected() -> Iterator[list[int]]:
    """The generation of each collection, in order; the collector itself is left alone."""
    found: list[int] = []

    def collect(generation: int = 2) -> int:
        found.append(generation)
        return 0

    with mock.patch("gc.collect", collect):
        yield found


def steps(settings: RuntimeSettings, evaluated: int = 0) -> None:
    with ManualCollection(settings) as garbage:
        for iteration in range(1, 7):
            garbage.after_step(iteration, will_evaluate=iteration == evaluated)
            if iteration == evaluated:
                garbage.after_evaluation()


def test_python_collects_by_itself_without_it(collected: list[int]) -> None:
    with ManualCollection(RuntimeSettings()) as garbage:
        assert gc.isenabled()
        garbage.after_step(1, will_evaluate=True)
        garbage.after_evaluation()
    assert collected == []


@pytest.mark.parametrize(("interval", "times"), [(0, 0), (2, 3), (4, 1), (7, 0)])
def test_it_collects_at_the_start_and_after_every_so_many_steps(
    interval: int, times: int, collected: list[int]
) -> None:
    steps(RuntimeSettings(manual_gc=True, manual_gc_interval=interval))
    assert collected == [2] + [2] * times


def test_it_collects_around_the_validation_loss(collected: list[int]) -> None:
    steps(RuntimeSettings(manual_gc=True), evaluated=3)
    assert collected == [2, 2, 0]
    collected.clear()
    steps(RuntimeSettings(manual_gc=True, no_manual_gc_eval=True), evaluated=3)
    assert collected == [2]


@pytest.mark.parametrize("fails", [False, True])
def test_pythons_own_collector_rests_in_between(fails: bool) -> None:
    """Cycles stay until the step that collects, and afterwards the collector is as it was."""
    assert gc.isenabled()
    try:
        with ManualCollection(RuntimeSettings(manual_gc=True, manual_gc_interval=2)) as garbage:
            assert not gc.isenabled()
            cycle: list[object] = []
            cycle.append(cycle)
            del cycle
            garbage.after_step(1, will_evaluate=False)
            assert gc.get_count()[0] > 0
            garbage.after_step(2, will_evaluate=False)
            if fails:
                raise ValueError
    except ValueError:
        pass
    assert gc.isenabled()


def test_a_run_collects_so(collected: list[int]) -> None:
    """Collected before its first step, after steps 2 and 4, and around step 3's validation loss."""
    from qwen2_ascend.training import setup

    settings = SimpleNamespace(
        runtime=RuntimeSettings(manual_gc=True, manual_gc_interval=2),
        data=SimpleNamespace(eval_interval=3),
    )
    progress = SimpleNamespace(iteration=0)
    run: Any = SimpleNamespace(
        settings=settings, progress=progress, train_iters=4, valid_data=object()
    )
    during: list[bool] = []

    def train(run: Any, *, on_step: Any, on_validation: Any, **_: Any) -> None:
        for progress.iteration in range(1, 5):
            during.append(gc.isenabled())
            on_step(mock.Mock(stop_wanted=True), 0.1)
            if progress.iteration == 3:
                on_validation(1.0)

    with mock.patch.object(setup, "train", train), mock.patch.object(setup, "_step"):
        assert setup._train(run, mock.Mock(), mock.Mock(), None)
    assert collected == [2, 2, 2, 0, 2]
    assert during == [False] * 4 and gc.isenabled()
