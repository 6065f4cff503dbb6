"""--swap-attention: every copy is waited for before its tensor is read or its memory goes.

torch_npu's own sanitizer watches a step: for each operator it compares the streams that last wrote
and read a tensor with the events that were waited for since, and when memory is freed, whether the
allocator was told of the other stream that used it. So an order that a device may break is found
here, where all runs in order. The steps without one of swapping's waits show that it would be.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from npusim.conftest import INSIDE

FLAGS = (
    "--mock-data --seq-length 24 --global-batch-size 4 --micro-batch-size 2 --train-iters 4 "
    "--lr 1e-3 --device npu"
)

if INSIDE in os.environ:
    # the caching allocator is the one that tells the sanitizer; read at the first allocation
    os.environ.pop("PYTORCH_NO_NPU_MEMORY_CACHING", None)
    os.environ["PYTORCH_NPU_ALLOC_CONF"] = "expandable_segments:False"


class Watch:
    """The sanitizer, and what it has found of freed memory."""

    def __init__(self, sanitizer: Any) -> None:
        self._handler = sanitizer.event_handler

    def taken(self) -> list[Any]:
        """The allocator's errors since the last time."""
        found = list(self._handler.record_stream_errors)
        self._handler.record_stream_errors.clear()
        return found


@contextmanager
def watching() -> Iterator[Watch]:
    """Lets torch_npu's sanitizer see every operator, event and allocation of the block."""
    from torch_npu.npu._sanitizer import NPUSanitizer

    sanitizer = NPUSanitizer()
    sanitizer.enable()
    try:
        yield Watch(sanitizer)
    finally:
        sanitizer.dispatch.__exit__(None, None, None)
        sanitizer.dispatch = None


def _without_wait_before_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen2_ascend.runtime.swapping import HostSwap

    def take(self: Any, swapped: Any) -> Any:
        self.fetch(swapped)
        return swapped.back

    monkeypatch.setattr(HostSwap, "take", take)


def _without_wait_before_copying(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen2_ascend.runtime.swapping import HostSwap

    copying = HostSwap._copying
    monkeypatch.setattr(
        HostSwap, "_copying", lambda self, device, waits=True: copying(self, device, waits=False)
    )


def _without_telling_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)


BROKEN: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "no wait before reading": (_without_wait_before_reading, "data race"),
    "no wait before copying": (_without_wait_before_copying, "data race"),
    "allocator not told": (_without_telling_the_allocator, "missing record_stream"),
}
"""Swapping without one of its orders, and what the sanitizer says of it."""


# Foreign warnings are errors in the CPU's training tests, and torch_npu adds many of its own.
@pytest.mark.filterwarnings("default")
@pytest.mark.simulated(alone="swapping")
def test_every_copy_is_waited_for(run, monkeypatch):
    from distributed.train_worker import start, steps

    plain = [result.loss for result in steps(start(run, FLAGS), 2)]
    with watching() as watch:
        training = start(run, f"{FLAGS} --swap-attention")
        watch.taken()
        losses = [result.loss for result in steps(training, 2)]
        assert losses == plain
        assert not watch.taken()
        for name, (broken, expected) in BROKEN.items():
            training = start(run, f"{FLAGS} --swap-attention")
            watch.taken()
            with monkeypatch.context() as changed:
                broken(changed)
                found = _errors(training, watch)
            assert any(expected in str(error) for error in found), (name, found)


def _errors(training: Any, watch: Watch) -> list[Any]:
    """What the sanitizer says of one step."""
    from torch.cuda._sanitizer import CUDASanitizerErrors

    from distributed.train_worker import steps

    try:
        steps(training, 1)
    except CUDASanitizerErrors as error:
        return error.errors
    return watch.taken()
