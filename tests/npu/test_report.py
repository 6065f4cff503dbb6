"""The report that hardware runs leave: written here from made-up results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from npu.hardware import parse_driver
from npu.report import Check, anonymous, as_text, versions, write

CHECKS = [
    Check(name="test_rms_norm", outcome="passed", seconds=1.26, figures={"result": 1.234e-7}),
    Check(name="test_attention", outcome="failed", seconds=20.0, message="assert 0.5 <= 0.1"),
    Check(name="test_tp2", outcome="skipped", seconds=0.0, message="2 cards, 1 here"),
]


def test_both_files_say_the_same(tmp_path: Path) -> None:
    text = write(tmp_path / "new", {"torch": "2.7.1", "chip": "Ascend910B3"}, CHECKS)
    assert (tmp_path / "new" / "report.txt").read_text(encoding="utf-8") == text
    assert text.splitlines()[:2] == ["torch: 2.7.1", "chip: Ascend910B3"]
    assert "passed   test_rms_norm       1.3 s  result=1.23e-07" in text
    assert "failed   test_attention     20.0 s\n         assert 0.5 <= 0.1" in text
    assert text.endswith("\n1 passed, 1 failed, 1 skipped\n")
    raw = json.loads((tmp_path / "new" / "report.json").read_text(encoding="utf-8"))
    assert raw["machine"] == {"torch": "2.7.1", "chip": "Ascend910B3"}
    assert raw["checks"][0]["figures"] == {"result": 1.234e-7}
    assert [check["outcome"] for check in raw["checks"]] == ["passed", "failed", "skipped"]


def test_an_empty_report_is_no_error() -> None:
    assert as_text({}, []) == "\n0 passed, 0 failed, 0 skipped\n"


def test_messages_keep_no_folders() -> None:
    text = "\nFileNotFoundError: /srv/models/secret/model.pt is missing\nmore"
    assert anonymous(text) == "FileNotFoundError: .../model.pt is missing"
    assert anonymous("") == ""
    assert len(anonymous("x" * 1000)) == 300


def test_npu_smi_is_read() -> None:
    """Its output as the documents print it; it was never run here."""
    assert parse_driver("| npu-smi 24.1.rc3     Version: 24.1.rc3       |") == "24.1.rc3"
    assert parse_driver("nothing") is None


def test_versions_name_what_is_installed() -> None:
    found = versions()
    assert found["torch"].startswith("2.") and "python" in found
    assert not any("/" in value for value in found.values())


MADE_UP = """
import pytest
@pytest.mark.hardware
def test_good(figures):
    figures["error"] = 1e-7
@pytest.mark.hardware
def test_bad(figures):
    assert 1 == 2, "/srv/x"
@pytest.mark.hardware(cards=8)
def test_many(): ...
def test_other(): ...
"""


def test_a_run_on_hardware_leaves_a_report(tmp_path: Path) -> None:
    """The whole way, on a made-up machine with two cards."""
    (tmp_path / "test_made_up.py").write_text(MADE_UP, encoding="utf-8")
    (tmp_path / "conftest.py").write_text(
        "from npu import conftest as real\n"
        "from npu.conftest import *\n"
        "real.no_hardware = lambda: (None, {'devices': 2, 'chip': 'Ascend910B3'})\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "NPU_REPORT": str(tmp_path / "report"),
        },
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert "2 passed" in done.stdout and "1 failed" in done.stdout, done.stdout + done.stderr
    raw = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    checks = {check["name"].rpartition("::")[2]: check for check in raw["checks"]}
    assert set(checks) == {"test_good", "test_bad", "test_many"}
    assert checks["test_good"]["figures"] == {"error": 1e-7}
    assert checks["test_bad"]["outcome"] == "failed"
    assert "someone" not in checks["test_bad"]["message"]
    assert checks["test_many"]["message"].endswith("8 cards, 2 here")
    assert raw["machine"]["chip"] == "Ascend910B3" and "torch" in raw["machine"]


def without_hardware(report: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess:
    """Runs the tests of hardware where neither npu-smi nor a CUDA device is found."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    hidden = {"PATH": "/nowhere", "CUDA_VISIBLE_DEVICES": "", "NPU_REPORT": str(report)}
    kept = {name: value for name, value in os.environ.items() if name != "HARDWARE"}
    return subprocess.run(
        [*command, "-m", "hardware", str(Path(__file__).parent)],
        env={**kept, **hidden, **environ},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_without_hardware_all_is_skipped_with_the_reason(tmp_path: Path) -> None:
    done = without_hardware(tmp_path / "report")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no NPU: `npu-smi info` does not work here" in done.stdout
    assert "passed" not in done.stdout.splitlines()[-1]
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("npu", "no NPU: `npu-smi info` does not work here"),
        ("cuda", "no CUDA: torch sees no device"),
    ],
)
def test_hardware_that_is_named_and_absent_is_an_error(
    kind: str, reason: str, tmp_path: Path
) -> None:
    """So `make test-cuda` does not end well where it has tested nothing."""
    done = without_hardware(tmp_path / "report", HARDWARE=kind)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
    assert done.stderr.strip() == f"ERROR: {reason}"
    assert not (tmp_path / "report").exists()


def test_without_hardware_its_tests_can_be_collected(tmp_path: Path) -> None:
    done = without_hardware(tmp_path / "report", "--collect-only", HARDWARE="cuda")
    assert done.returncode == 0, done.stdout + done.stderr
    for file in ("test_figures.py", "test_operators.py", "test_training_runs.py"):
        assert file in done.stdout
