"""Checkouts of the genuine tools, which the tests of this folder read and run.

    MEGATRON_LM_PATH     of Megatron-LM, such as core_v0.12.1 and core_v0.16.1
    MINDSPEED_LLM_PATH   of MindSpeed-LLM, such as 2.2.0 (converter v1) and 26.1.0 (converter v2)
    MINDSPEED_PATH       of MindSpeed, the branch that goes with MindSpeed-LLM's, for converter v1
    MEGATRON_BRIDGE_PATH of Megatron-Bridge, such as v0.3.1, for megatron-core 0.16
    MBRIDGE_PATH         of mbridge

Each names one folder, or several with the system's path separator between them. Nothing is
downloaded. Without a folder its tests skip and say so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import commands
from commands import TESTS
from npusim.build import Unavailable
from npusim.env import environment


def checkouts(variable: str, has: Callable[[Path], bool], what: str) -> list[Path]:
    """The folders that an environment variable names, as far as `has` says so.

    Skips the test that asks where there is none.

    Args:
        variable: its name.
        has: whether a folder has what the test runs.
        what: that, for the message.
    """
    named = [Path(path) for path in os.environ.get(variable, "").split(os.pathsep) if path]
    assert all(path.is_dir() for path in named), f"{variable}: {named}"
    found = [path for path in named if has(path)]
    if not found:
        pytest.skip(f"{variable} names no checkout that has {what}")
    return found


def contains(file: str, text: str) -> Callable[[Path], bool]:
    """Whether a checkout's file is there and has a text in it."""

    def has(folder: Path) -> bool:
        path = folder / file
        return path.is_file() and text in path.read_text(encoding="utf-8")

    return has


def run_python(
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    seconds: int = 300,
) -> str:
    """What `python ARGUMENTS...` printed, in `folder`; it must end well.

    The tests' folder and the package come last on its path.
    """
    base = dict(os.environ if environment is None else environment)
    places = [base.get("PYTHONPATH", ""), str(TESTS), str(TESTS.parent / "plugin")]
    base["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    return commands.run_python(*arguments, environ=base, folder=folder, seconds=seconds).out


def simulated(num_devices: int, *places: Path) -> dict[str, str]:
    """The variables of a process on simulated cards; skips the test where there are none.

    Args:
        num_devices: cards.
        places: what comes first on its path.
    """
    try:
        found = environment(num_devices=num_devices)
    except Unavailable as error:
        pytest.skip(f"no simulated device: {error}")
    found["PYTHONPATH"] = os.pathsep.join([*map(str, places), found["PYTHONPATH"]])
    found["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron-LM insists on it
    return found
