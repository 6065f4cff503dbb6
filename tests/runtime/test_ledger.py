"""The ledger replaces an attribute once and keeps the record."""

from __future__ import annotations

import sys
import types

import pytest

from qwen2_ascend.runtime import ledger


@pytest.fixture
def somebody(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module of somebody else's with a class in it, and an empty ledger."""
    module = types.ModuleType("somebody")
    module.Thing = type("Thing", (), {"answer": lambda self: 1})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somebody", module)
    monkeypatch.setattr(ledger, "_APPLIED", {})
    return module


REASONS = {"why": "w", "how": "h", "until": "u"}
PATCH = ledger.Patch(target="somebody:Thing.answer", **REASONS)


def test_a_second_application_does_nothing(somebody: types.ModuleType) -> None:
    for _ in range(2):
        ledger.apply(PATCH.target, lambda original: lambda self: original(self) + 1, **REASONS)
    assert somebody.Thing().answer() == 2
    assert ledger.applied_patches() == (PATCH,)


def test_a_passing_replacement_is_taken_back_and_recorded(somebody: types.ModuleType) -> None:
    with ledger.applied_during(PATCH.target, lambda original: lambda self: 7, **REASONS):
        assert somebody.Thing().answer() == 7
    assert somebody.Thing().answer() == 1
    assert ledger.applied_patches() == (PATCH,)


def test_a_target_that_is_gone_is_an_error_and_leaves_no_record(
    somebody: types.ModuleType,
) -> None:
    with pytest.raises(AttributeError, match="gone"):
        ledger.apply("somebody:Thing.gone", lambda original: original, **REASONS)
    assert ledger.applied_patches() == ()
