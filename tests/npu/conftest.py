"""Tests marked `npu` run on this machine's Ascend NPUs, or skip and say why there is none.

`make test-npu` runs them and leaves a report (report.py) in npu-report, or where NPU_REPORT says.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from npu.report import Check, anonymous, npu_smi, parse_driver, versions, write

FIGURES = pytest.StashKey[dict]()
CHECKS = pytest.StashKey[list]()
REASON = pytest.StashKey[str]()
DEVICE = pytest.StashKey[dict]()

PROBE = """
import json
import torch_npu
from qwen2_ascend.runtime import npu
import torch
count = torch.npu.device_count()
print(json.dumps({"devices": count, "simulated": npu.is_simulated(),
    "chip": torch.npu.get_device_name(0) if count else None,
    "memory_gib": torch.npu.get_device_properties(0).total_memory / 2**30 if count else None}))
"""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "npu(cards): needs so many real Ascend NPUs, one without")
    # of the module whose check functions are used here too
    config.addinivalue_line("markers", "simulated(cards, soc, alone): see tests/npusim")
    config.stash[CHECKS] = []


def no_hardware() -> tuple[str | None, dict]:
    """(why there is no NPU or None, what is known of it)."""
    if (text := npu_smi("info")) is None:
        return "`npu-smi info` does not work here", {}
    environ = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROBE],
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return f"torch_npu does not work: {last[0]}", {}
    device = {"driver": parse_driver(text), **json.loads(done.stdout.splitlines()[-1])}
    if not device["devices"]:
        return "torch_npu sees no device", device
    if device["simulated"]:
        return "the device is simulated", device
    return None, device


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("npu")]
    if not marked:
        return
    reason, device = no_hardware()
    config.stash[DEVICE] = device
    for item in marked:
        cards = item.get_closest_marker("npu").kwargs.get("cards", 1)  # type: ignore[union-attr]
        if reason:
            item.add_marker(pytest.mark.skip(reason=f"no NPU: {reason}"))
        elif device["devices"] < cards:
            item.add_marker(pytest.mark.skip(reason=f"{cards} cards, {device['devices']} here"))


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> dict:
    """What a test has measured, for the report."""
    return request.node.stash.setdefault(FIGURES, {})


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = (yield).get_result()
    if item.get_closest_marker("npu") is None:
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
    folder = Path(os.environ.get("NPU_REPORT", "npu-report"))
    write(folder, {**versions(), **session.config.stash[DEVICE]}, checks)
    print(f"\nreport: {folder / 'report.txt'} and report.json; please send them back")
