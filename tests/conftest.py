"""Fixtures of several rooms, and the warnings that are somebody else's."""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from distributed.harness import Launches
from qwen2_ascend.runtime import absent_triton

pytest_plugins = ["selection"]

FOREIGN_WARNINGS = (
    # megatron-core, at import, about packages that an NPU or CPU does not have
    "ignore:.*Transformer Engine and Apex are not installed",
    "ignore:Apex is not installed",
    # megatron-core's own default for a field that nobody sets here
    "ignore:full scope is deprecated",
    # megatron-core 0.19, where it is used in a process that is no rank
    "ignore:Could not determine rank from torch.distributed",
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
    absent_triton.lend()  # tests import megatron-core where `runtime.start` has not been called
    for warning in FOREIGN_WARNINGS:
        config.addinivalue_line("filterwarnings", warning)


# --- in several processes (-n 2 --dist loadgroup) -------------------------------------------------


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first: begun last, they would be waited for alone."""
    if not hasattr(config, "workerinput"):
        return
    import selection

    costs = selection.stored_durations()
    scopes: dict[str, list[pytest.Item]] = {}
    for item in items:
        scopes.setdefault(_scope(item.nodeid), []).append(item)
    longest = sorted(scopes, key=lambda scope: -selection.seconds_of(scopes[scope], costs))
    items[:] = [item for scope in longest for item in scopes[scope]]


def _scope(nodeid: str) -> str:
    """What one process runs: a file, or all simulated cards, which start their ranks once."""
    file = nodeid.partition("::")[0]
    return "simulated" if file.startswith("tests/npusim/") else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keeps together what `_scope` says.

    pytest-xdist 3.8 writes its groups into node ids, from which pytest 9 does not read them.
    """
    from xdist.scheduler import LoadGroupScheduling

    class ByFile(LoadGroupScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _scope(nodeid)

    if config.getvalue("dist") != "loadgroup":
        return None
    config.option.loadscopereorder = False  # by the number of tests
    return ByFile(config, log)


@pytest.fixture(scope="session")
def launches(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """The launches of this test run; see distributed/harness.py."""
    import selection  # a plugin: pytest imports it first

    folder = tmp_path_factory.mktemp("launches")
    return Launches(folder, selection.wanted_checks(request.session.items))


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one, so that hundreds of runs flush to no disk."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=folder) as name:
        yield Path(name)
