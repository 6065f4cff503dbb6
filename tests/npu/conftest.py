"""Tests marked `hardware` run on this machine's devices, or skip and say why there is none.

HARDWARE says of which kind: npu (the default), cuda, or cpu, which proves the tests (hardware.py).
Who names a kind that is not there gets no skipped tests but an error.
`make test-npu` and `make test-cuda` run them and leave a report (report.py) in npu-report and
cuda-report, or where REPORT says.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from npu.hardware import VARIABLE, Hardware, chosen
from npu.report import Check, anonymous, versions, write

FIGURES = pytest.StashKey[dict]()
CHECKS = pytest.StashKey[list]()
REASON = pytest.StashKey[str]()
DEVICE = pytest.StashKey[dict]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "hardware(cards): needs so many real devices, one without")
    # of the module whose check functions are used here too
    config.addinivalue_line("markers", "simulated(cards, soc, alone): see tests/npusim")
    config.stash[CHECKS] = []


def no_hardware() -> tuple[str | None, dict]:
    """(why there is no device of the chosen kind or None, what is known of it)."""
    return chosen().find()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("hardware")]
    if not marked:
        return
    reason, device = no_hardware()
    if reason and VARIABLE in os.environ and not config.option.collectonly:
        raise pytest.UsageError(f"no {chosen().name.upper()}: {reason}")
    config.stash[DEVICE] = device
    for item in marked:
        cards = item.get_closest_marker("hardware").kwargs.get("cards", 1)  # type: ignore[union-attr]
        if reason:
            item.add_marker(pytest.mark.skip(reason=f"no {chosen().name.upper()}: {reason}"))
        elif device["devices"] < cards:
            item.add_marker(pytest.mark.skip(reason=f"{cards} cards, {device['devices']} here"))


@pytest.fixture(scope="session")
def hardware() -> Hardware:
    """The kind of device that is tested."""
    return chosen()


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> dict:
    """What a test has measured, for the report."""
    return request.node.stash.setdefault(FIGURES, {})


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = (yield).get_result()
    if item.get_closest_marker("hardware") is None:
        return
    if report.when != "call" and report.outcome == "passed":
        return
    item.config.stash[CHECKS].append(
        Check(
            name=item.nodeid.rpartition("npu/")[2],
            outcome=report.outcome,
            seconds=call.duration,
            figures=dict(item.stash.get(FIGURES, {})),
            message=anonymous(_message(report)),
        )
    )


def _message(report: pytest.TestReport) -> str:
    if report.outcome == "passed":
        return ""
    if isinstance(report.longrepr, tuple):  # a skip: path, line, reason
        return report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message if crash else str(report.longrepr)


def pytest_sessionfinish(session: pytest.Session) -> None:
    checks = session.config.stash[CHECKS]
    if not any(check.outcome != "skipped" for check in checks):
        return
    folder = Path(chosen().report)
    write(folder, {**versions(), **session.config.stash[DEVICE]}, checks)
    print(f"\nreport: {folder / 'report.txt'} and report.json; please send them back")
