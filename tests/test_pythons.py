"""`make test-pythons` is no part of CI: that its tests need no torch is seen here."""

from __future__ import annotations

import subprocess
import sys

import pythons

WITHOUT_TORCH = """
import sys
sys.modules.update(dict.fromkeys(("deepspeed", "megatron", "torch", "transformers")))
import pytest
sys.exit(pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def test_what_every_python_runs_is_collected_without_torch() -> None:
    files = [str(pythons.ROOT / "tests" / name) for name in pythons.TESTS]
    command = [sys.executable, "-c", WITHOUT_TORCH, *files]
    done = subprocess.run(command, cwd=pythons.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr


def test_every_python_that_the_metadata_names_is_known() -> None:
    assert pythons.named() == ["3.10", "3.11", "3.12", "3.13"]
