"""`qwen2-ascend doctor`: runs all checks and prints what they find."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence

from qwen2_ascend.doctor import host, megatron, npu, python
from qwen2_ascend.doctor.findings import Finding, note, report
from qwen2_ascend.doctor.machine import Machine

CHECKS: tuple[tuple[str, Callable[[Machine], Iterator[Finding]]], ...] = (
    ("python", python.check_python),
    ("packages", python.check_packages),
    ("torch", python.check_torch),
    ("megatron", megatron.check_megatron),
    ("MindSpeed", megatron.check_mindspeed),
    ("NPU", npu.check_devices),
    ("npu-smi", npu.check_npu_smi),
    ("CANN", npu.check_cann),
    ("torch_npu", npu.check_torch_npu),
    ("environment", npu.check_environment),
    ("memory", host.check_memory),
    ("limits", host.check_limits),
    ("network", host.check_network),
)


def examine(machine: Machine) -> list[Finding]:
    """All findings. A check that fails is a finding itself; nothing is raised."""
    findings = []
    for name, check in CHECKS:
        try:
            findings += list(check(machine))
        except Exception as error:
            findings.append(note(name, f"could not be examined: {type(error).__name__}: {error}"))
    return findings


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the findings.

    Raises:
        SystemExit: 1, when there is a problem.
    """
    parser = argparse.ArgumentParser(
        description="Shows versions, devices and limits, and what is wrong with them. "
        "Exits with 1 when something is."
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    as_json = parser.parse_args(argv).json
    findings = examine(Machine())
    has_problem = any(finding.level == "problem" for finding in findings)
    if as_json:
        raw = {"ok": not has_problem, "findings": [finding._asdict() for finding in findings]}
        print(json.dumps(raw, indent=1))
    else:
        print(report(findings))
    if has_problem:
        raise SystemExit(1)
