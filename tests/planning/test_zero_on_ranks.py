"""Memory as planned for ZeRO is that of DeepSpeed's steps on CPU ranks."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from distributed.harness import each_check
from planning.zero_worker import CHECKS

WORKER = Path(__file__).with_name("zero_worker.py")
# not importorskip: DeepSpeed's import looks for devices
needs = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the extra `deepspeed` is not installed"
)
test_planned_is_measured = needs(each_check(WORKER, CHECKS))
