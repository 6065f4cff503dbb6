"""What is wrong with an NPU is told with the way out, from error texts as they are in the wild."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2_ascend.runtime import diagnosis
from qwen2_ascend.runtime.diagnosis import explain, import_fault, no_device_fault

# Beginnings of texts that users of torch_npu and its documents show.
TEXTS = {
    "EI0006": "RuntimeError: InnerRunOpApi:torch_npu/csrc/framework/OpParamMaker.cpp:281 OPS "
    "function error: HcclAllreduce, error code is 6\n"
    "[ERROR] 2025-04-08-18:07:20 (PID:1292363, Device:1, RankID:1) ERR01100 OPS call acl api "
    "failed.\nEI0006: [PID: 1292363] 2025-04-08-18:07:20.444.436 Getting socket times out. Reason: "
    "Remote Rank did not send the data in time. Please check the reason for the rank being stuck",
    "EI0002": "Warning: NPU warning, error code is 507048[Error]: \n"
    "[Error]: The execution of the internal task times out. \n"
    "EI0002: [PID: 7277] 2024-11-28-11:59:30.645.648 The wait execution of the Notify register "
    "times out. Reason: The Notify register has not received the Notify record from remote rank",
    "out of memory": "RuntimeError: NPU out of memory. Tried to allocate 5.03 GiB (NPU 3; 60.96 "
    "GiB total capacity; 49.47 GiB already allocated; 49.47 GiB current active; 1.32 GiB free)",
    "107001": "RuntimeError: Initialize:compiler_depend.ts:147 NPU function error: "
    "c10_npu::SetDevice(device_id_), error code is 107001\n[Error]: Invalid device ID.",
    "500001": "RuntimeError: Initialize:compiler_depend.ts:217 NPU function error: at_npu::native"
    "::AclSetCompileopt(aclCompileOpt::ACL_PRECISION_MODE, precision_mode), error code is 500001",
    "ERR02200": "[ERROR] 2024-08-18-22:15:47 (PID:23232, Device:0, RankID:0) ERR02200 DIST call "
    "hccl api failed.",
    "EI0004": "EI0004: The ranktable is invalid. Reason: the ranktable file cannot be parsed",
    "EI0005": "EI0005: The arguments for collective communication are inconsistent between ranks",
    "EJ0001": "EJ0001: Failed to initialize the HCCP process. Reason: Maybe the last training "
    "process is running.",
    "missing processes": "torch.distributed.DistStoreError: Timed out after 601 seconds waiting "
    "for clients. 1/2 clients joined.",
    "port in use": "torch.distributed.DistNetworkError: The server socket has failed to listen on "
    "any local network address. port: 29500, code: -98, message: address already in use",
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_known_text_is_explained_with_a_way_out(name: str) -> None:
    told = explain(TEXTS[name], {})
    assert told is not None and told.startswith(f"{name}: ")
    assert "; way out: " in told and "{" not in told


def test_a_time_out_is_told_with_its_seconds() -> None:
    assert "HCCL_CONNECT_TIMEOUT (120 s)" in (explain("EI0006", {}) or "")
    told = explain(TEXTS["EI0006"], {"HCCL_CONNECT_TIMEOUT": "600"}) or ""
    assert "(600 s)" in told and "more than 600 s apart" in told
    assert "HCCL_EXEC_TIMEOUT (30 s)" in (explain("EI0002", {"HCCL_EXEC_TIMEOUT": "30"}) or "")


def test_an_unknown_text_is_not_explained() -> None:
    assert explain("KeyError: 'x'", {}) is None
    assert explain("The size of tensor a (3) must match the size of tensor b (4)", {}) is None


def test_the_bring_up_page_has_every_known_error() -> None:
    page = (Path(__file__).parents[2] / "docs" / "npu.md").read_text(encoding="utf-8")
    seconds = {"connect": 120, "exec": 1836}
    for known in diagnosis.KNOWN_ERRORS:
        row = f"| {known.name} | {known.cause} | {known.way_out} |"
        assert row.format_map(seconds) in page


# --- torch_npu that cannot be imported ------------------------------------------------------------

NO_CANN = "libascendcl.so: cannot open shared object file: No such file or directory"
HOME = "/usr/local/Ascend/ascend-toolkit/latest"


@pytest.fixture
def machine(tmp_path: Path):
    """Makes files below a root of its own."""

    def make(*paths: str) -> Path:
        for path in paths:
            file = tmp_path / path.lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        return tmp_path

    return make


def test_cann_that_is_not_installed(machine) -> None:
    told = import_fault(NO_CANN, {}, machine())
    assert "libascendcl.so is not found: CANN is not installed" in told


def test_cann_that_was_not_sourced(machine) -> None:
    root = machine("/usr/local/Ascend/ascend-toolkit/set_env.sh")
    told = import_fault(NO_CANN, {}, root)
    assert "not set up; source /usr/local/Ascend/ascend-toolkit/set_env.sh" in told


def test_cann_in_the_home_of_the_user(machine) -> None:
    root = machine("/users/me/Ascend/cann/set_env.sh")
    told = import_fault(NO_CANN, {"HOME": "/users/me"}, root)
    assert "source /users/me/Ascend/cann/set_env.sh" in told


def test_cann_that_was_removed_after_it_was_sourced(machine) -> None:
    told = import_fault(NO_CANN, {"ASCEND_HOME_PATH": HOME}, machine())
    assert f"ASCEND_HOME_PATH={HOME} does not exist any more; install CANN" in told


def test_cann_without_one_of_its_packages(machine) -> None:
    root = machine(f"{HOME}/version.cfg")
    told = import_fault("libatb.so: cannot open shared object", {"ASCEND_HOME_PATH": HOME}, root)
    assert told.startswith("libatb.so is not found, though ASCEND_HOME_PATH=")
    assert "nnal" in told


def test_a_driver_that_is_not_there(machine) -> None:
    told = import_fault("libascend_hal.so: cannot open shared object file", {}, machine())
    assert "the driver's libascend_hal.so is not found" in told


def test_cann_of_another_version(machine) -> None:
    told = import_fault("libtorch_npu.so: undefined symbol: aclrtFoo", {}, machine())
    assert "does not fit CANN" in told and "docs/npu.md" in told


def test_anything_else_is_repeated(machine) -> None:
    told = import_fault("No module named 'yaml'", {}, machine())
    assert told == "torch_npu cannot be imported (No module named 'yaml')."


# --- devices --------------------------------------------------------------------------------------


def test_a_driver_without_a_device(machine) -> None:
    assert "there is no /dev/davinci*" in no_device_fault({}, machine())
    told = no_device_fault({}, machine("/dev/davinci0", "/dev/davinci1", "/dev/davinci_manager"))
    assert "though there are 2 (/dev/davinci*)" in told and "HwHiAiUser" in told


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("0, 1", "up to the first character"),
        ("0-3", "up to the first character"),
        ("", "up to the first character"),
        ("all", "up to the first character"),
        ("1,0", "have to rise"),
        ("0,0", "have to rise"),
        ("0,2", "has the cards 0 to 1"),
    ],
)
def test_a_wrong_choice_of_devices(value: str, words: str, machine) -> None:
    root = machine("/dev/davinci0", "/dev/davinci1")
    told = no_device_fault({"ASCEND_RT_VISIBLE_DEVICES": value}, root)
    assert told.startswith(f"ASCEND_RT_VISIBLE_DEVICES={value!r}") and words in told


def test_a_right_choice_of_devices() -> None:
    environ = {"ASCEND_RT_VISIBLE_DEVICES": "0,1,3"}
    assert diagnosis.visible_devices_fault(environ, 4) is None
    assert diagnosis.visible_devices_fault({}, None) is None


def test_a_driver_is_seen_by_its_devices(machine) -> None:
    assert not diagnosis.has_driver(machine())
    assert diagnosis.has_driver(machine("/dev/davinci_manager"))


@pytest.mark.parametrize(
    ("error", "is_lost", "has_timed_out"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer"), True, False),
        (RuntimeError("[gloo/..] Timed out waiting 6000ms for recv operation"), True, True),
        (RuntimeError("Gloo connectFullMesh failed with Connection refused"), True, False),
        (RuntimeError("EI0002: the wait execution of the Notify register times out"), True, True),
        (RuntimeError("Watchdog caught collective operation timeout"), True, True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False, False),
        (ValueError("gloo"), False, False),
    ],
)
def test_an_error_that_may_come_of_another_rank(
    error: Exception, is_lost: bool, has_timed_out: bool
) -> None:
    assert diagnosis.is_lost_connection(error) == is_lost
    assert diagnosis.has_timed_out(error) == has_timed_out
