"""What torchrun says of a process's place is read, and refused where it is no place."""

from __future__ import annotations

import pytest

from qwen2_ascend import machine
from qwen2_ascend.errors import UserError


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*machine.TORCHRUN, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_a_process_alone_is_the_only_rank() -> None:
    assert machine.place() == (0, 1, 0)
    assert machine.local_world_size(3) == 3


def test_torchrun_says_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip((*machine.TORCHRUN, "LOCAL_WORLD_SIZE"), "5824", strict=True):
        monkeypatch.setenv(name, value)
    assert machine.place() == (5, 8, 2)
    assert machine.local_world_size(8) == 4


def test_a_place_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(machine.TORCHRUN, ("one", "2", "0"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="RANK=one is no number"):
        machine.place()
    assert machine.rank() == 0, "what reports that fault must not fail by it"
