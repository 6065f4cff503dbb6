"""Ascend's environment variables: set where unset, never against what the user has set."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from commands import run_python
from qwen2_ascend.errors import UserError
from qwen2_ascend.runtime import environment
from qwen2_ascend.runtime.environment import DETERMINISTIC, apply, describe, wanted


def test_every_variable_says_why_and_where_it_is_documented() -> None:
    variables = (environment.BEFORE_TORCH, *wanted(600, deterministic=True))
    assert len({variable.name for variable in variables}) == len(variables)
    assert all(len(variable.why) > 20 and variable.source for variable in variables)


def test_the_bring_up_page_has_every_variable() -> None:
    page = (Path(__file__).parents[2] / "docs" / "npu.md").read_text(encoding="utf-8")
    for variable in (environment.BEFORE_TORCH, *wanted(600, deterministic=True)):
        row = f"| `{variable.name}` | `{variable.value}` | {variable.why} | {variable.source} |"
        assert row in page


def test_only_what_is_unset_is_set() -> None:
    environ = {"TASK_QUEUE_ENABLE": "0", "HCCL_EXEC_TIMEOUT": ""}
    chosen = apply(wanted(600), environ)
    assert environ["TASK_QUEUE_ENABLE"] == "0" and environ["HCCL_EXEC_TIMEOUT"] == ""
    assert environ["HCCL_CONNECT_TIMEOUT"] == "600" and environ["CPU_AFFINITY_CONF"] == "1"
    assert not {"TASK_QUEUE_ENABLE", "HCCL_EXEC_TIMEOUT"} & {variable.name for variable in chosen}
    line = describe(wanted(600), chosen, environ)
    assert "\n" not in line and "set CPU_AFFINITY_CONF=1" in line
    assert "; found TASK_QUEUE_ENABLE=0" in line
    assert apply(wanted(600), environ) == [], "a second time there is nothing left to set"


@pytest.mark.parametrize("other", ["PYTORCH_ALLOC_CONF", "PYTORCH_NO_NPU_MEMORY_CACHING"])
def test_the_allocator_is_left_alone_where_another_variable_rules_it(other: str) -> None:
    """torch_npu ends the process when both names of its allocator's options are set."""
    environ = {other: "1"}
    apply(wanted(600), environ)
    assert "PYTORCH_NPU_ALLOC_CONF" not in environ


@pytest.mark.parametrize(
    ("seconds", "connect", "execute"),
    [(600, "600", "600"), (30, "120", "30"), (100_000, "7200", "100000"), (0.2, "120", "1")],
)
def test_time_outs_follow_the_flag_within_what_hccl_takes(
    seconds: float, connect: str, execute: str
) -> None:
    environ: dict[str, str] = {}
    apply(wanted(seconds), environ)
    assert environ["HCCL_CONNECT_TIMEOUT"] == connect
    assert environ["HCCL_EXEC_TIMEOUT"] == execute


@pytest.mark.parametrize(
    ("environ", "longest"),
    [
        ({}, 600),
        ({"HCCL_EXEC_TIMEOUT": "1800"}, 1800),
        ({"HCCL_CONNECT_TIMEOUT": "7200", "HCCL_EXEC_TIMEOUT": "x"}, 7200),
        ({"HCCL_EXEC_TIMEOUT": "0"}, 600),
    ],
)
def test_torch_waits_longer_than_hccl(environ: dict[str, str], longest: int) -> None:
    """Else torch ends the process before HCCL has said which rank is missing."""
    assert environment.group_timeout_seconds(600, environ) > longest


def test_the_deterministic_mode_brings_its_variables() -> None:
    environ: dict[str, str] = {}
    apply(wanted(600), environ)
    assert not {variable.name for variable in DETERMINISTIC} & set(environ)
    apply(wanted(600, deterministic=True), environ)
    assert environ["HCCL_DETERMINISTIC"] == "true"
    assert environ["CLOSE_MATMUL_K_SHIFT"] == "1"
    assert environ["ATB_MATMUL_SHUFFLE_K_ENABLE"] == "0"


def test_what_contradicts_the_deterministic_mode_is_refused_all_at_once() -> None:
    environ = {"HCCL_DETERMINISTIC": "false", "CLOSE_MATMUL_K_SHIFT": "0"}
    before = dict(environ)
    with pytest.raises(UserError) as caught:
        apply(wanted(600, deterministic=True), environ)
    assert len(caught.value.faults) == 2
    assert "HCCL_DETERMINISTIC=false contradicts --deterministic" in caught.value.faults[0]
    assert environ == before
    apply(wanted(600, deterministic=True), {"HCCL_DETERMINISTIC": "strict"})


def test_the_tables_are_there_without_torch() -> None:
    """`doctor` reads them on machines where torch cannot be imported."""
    code = (
        "import os, sys\n"
        "from qwen2_ascend.runtime import diagnosis, environment, mindspeed\n"
        "assert os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] == '0'\n"
        "assert not {'torch', 'numpy', 'megatron'} & set(sys.modules)\n"
    )
    environ = {k: v for k, v in os.environ.items() if k != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    run_python("-c", code, environ=environ)
