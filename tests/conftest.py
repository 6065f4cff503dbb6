"""Fixtures of several rooms, and the warnings that are somebody else's."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from distributed.harness import Launches

FOREIGN_WARNINGS = (
    # megatron-core, at import, about packages that an NPU or CPU does not have
    "ignore:.*Transformer Engine and Apex are not installed",
    "ignore:Apex is not installed",
    # megatron-core's own default for a field that nobody sets here
    "ignore:full scope is deprecated",
    # megatron-core's own imports of what it has deprecated itself
    "ignore::DeprecationWarning:megatron",
    # torch's inductor, which megatron-core imports when the runtime has not kept it from that
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell starts what runs in the background so, and every process here would inherit it:
        # tests of Ctrl-C could not press it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for warning in FOREIGN_WARNINGS:
        config.addinivalue_line("filterwarnings", warning)


@pytest.fixture(scope="session")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """The torchrun launches of this test run; see distributed/harness.py."""
    return Launches(tmp_path_factory.mktemp("launches"))
