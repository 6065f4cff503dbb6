"""Which device is chosen, and what an explicit one that cannot be used says."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

from qwen2_ascend.errors import UserError
from qwen2_ascend.runtime import Runtime, ledger, mindspeed, npu, select_device


@pytest.fixture
def torch_npu(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """An installed torch_npu of torch's own release with two devices; tests change its facts."""
    release = torch.__version__.split("+")[0]
    facts = types.SimpleNamespace(version=release, devices=2)
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    module = types.ModuleType("torch_npu")
    module.npu = types.SimpleNamespace(device_count=lambda: facts.devices)  # type: ignore
    find_spec, version = importlib.util.find_spec, importlib.metadata.version
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name == "torch_npu" or find_spec(name)
    )
    monkeypatch.setattr(
        importlib.metadata,
        "version",
        lambda name: facts.version if name == "torch_npu" else version(name),
    )
    return facts


def test_npu_is_chosen_where_one_is_usable(torch_npu: types.SimpleNamespace) -> None:
    assert select_device() == "npu"
    assert select_device("npu") == "npu"


def test_without_any_accelerator_the_cpu_is_chosen() -> None:
    if npu.missing() is None or torch.cuda.is_available():
        pytest.skip("this machine has an accelerator")
    assert select_device() == "cpu"


def test_npu_without_torch_npu_says_so() -> None:
    if importlib.util.find_spec("torch_npu"):
        pytest.skip("torch_npu is installed")
    with pytest.raises(UserError, match=r"torch_npu is not installed.*torch_npu==2\."):
        select_device("npu")


def test_npu_with_another_release_names_both(torch_npu: types.SimpleNamespace) -> None:
    torch_npu.version = "1.11.0"
    with pytest.raises(UserError, match=r"torch_npu is 1\.11\.0 and torch is 2\."):
        select_device("npu")
    assert select_device() != "npu"


@pytest.mark.parametrize(
    ("version", "numbers"),
    [
        ("2.7.1", "2.7.1"),
        ("2.7.1rc1", "2.7.1"),
        ("2.10.0rc2", "2.10.0"),
        ("2.7.1.post2", "2.7.1"),
        ("2.7.1.dev20250724", "2.7.1"),
        ("2.9.0a0+git1234", "2.9.0"),
        ("2.13.0+cpu", "2.13.0"),
    ],
)
def test_a_release_is_the_numbers_that_a_version_begins_with(version: str, numbers: str) -> None:
    assert mindspeed.release(version) == numbers


def test_megatron_adaptor_is_in_the_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_APPLIED", {})
    monkeypatch.setattr(mindspeed, "activate_adaptor", lambda: None)
    assert "no list" in npu.activate_adaptor()
    assert [patch.target for patch in ledger.applied_patches()] == ["megatron_adaptor:"]


@pytest.mark.parametrize("post", [".post2", "rc1"])
def test_a_post_release_or_a_candidate_is_the_same_release(
    post: str, torch_npu: types.SimpleNamespace
) -> None:
    torch_npu.version += post
    assert select_device("npu") == "npu"


def test_npu_without_a_device_says_so(torch_npu: types.SimpleNamespace) -> None:
    torch_npu.devices = 0
    with pytest.raises(UserError, match="sees no device"):
        select_device("npu")
    assert select_device() != "npu"


def test_an_npu_that_is_not_used_is_told_in_the_log(
    torch_npu: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A broken torch_npu must not lead to days on the CPU without a word."""
    monkeypatch.setattr(npu, "_ROOT", tmp_path)
    torch_npu.version = "1.11.0"
    line = npu.warning("cpu")
    assert line and line.startswith(
        "warning: no NPU is used, this runs on the cpu: torch_npu is 1."
    )
    assert "\n" not in line and "pip install" in line
    torch_npu.version = torch.__version__
    torch_npu.devices = 0
    assert "there is no /dev/davinci*" in (npu.warning("cpu") or "")


def test_a_machine_with_npus_and_without_torch_npu_is_told_in_the_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(npu, "_ROOT", tmp_path)
    monkeypatch.setattr(npu, "is_installed", lambda: False)
    assert npu.warning("cpu") is None
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "davinci0").touch()
    assert "this machine has NPUs, and this runs on the cpu" in (npu.warning("cpu") or "")


@pytest.mark.parametrize(
    ("sim", "node", "simulated"),
    [
        (None, None, True),
        (None, "davinci0", False),
        (None, "davinci_manager", False),
        ("Ascend910B2", "davinci0", True),
    ],
)
def test_a_device_without_a_driver_is_simulated(
    sim: str | None, node: str | None, simulated: bool, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(npu, "_ROOT", tmp_path)
    monkeypatch.delenv(npu.SIMULATED, raising=False)
    if sim:
        monkeypatch.setenv(npu.SIMULATED, sim)
    if node:
        (tmp_path / "dev").mkdir()
        (tmp_path / "dev" / node).touch()
    assert npu.is_simulated() is simulated


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    npu.check_process_count(8, 8)
    with pytest.raises(UserError, match=r"8 processes .* 4 npu device.*--nproc-per-node 4"):
        npu.check_process_count(8, 4)
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0, 1")
    with pytest.raises(UserError, match=r"VISIBLE_DEVICES=0, 1\); .* first character"):
        npu.check_process_count(2, 1)


def test_the_npu_path_transfers_and_records_its_additions(
    torch_npu: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which modules are imported and replaced; that megatron-core then runs is not shown here."""
    transfer = types.ModuleType("torch_npu.contrib.transfer_to_npu")
    monkeypatch.setitem(sys.modules, "torch_npu.contrib", types.ModuleType("torch_npu.contrib"))
    monkeypatch.setitem(sys.modules, "torch_npu.contrib.transfer_to_npu", transfer)
    monkeypatch.setattr(ledger, "_APPLIED", {})
    monkeypatch.setattr(torch.Tensor, "type", torch.Tensor.type)
    npu.redirect()
    assert [patch.target for patch in ledger.applied_patches()] == ["torch:Tensor.type"]
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1).type(torch.int64).dtype == torch.int64


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(UserError, match=r"device='gpu' is not one of cpu, cuda, npu\."):
        select_device("gpu")


def test_cuda_without_a_device_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(UserError, match="sees no CUDA device"):
        select_device("cuda")


@pytest.mark.parametrize(
    ("name", "dtype", "supported", "says"),
    [
        ("cpu", "bf16", False, True),
        ("cpu", "bf16", True, False),
        ("cpu", "fp16", False, True),
        ("cpu", "fp32", False, False),
        ("cuda", "bf16", False, False),
    ],
)
def test_a_cpu_that_multiplies_slowly_is_said(
    name: str, dtype: str, supported: bool, says: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for answer in ("bf16", "fp16"):
        monkeypatch.setattr(
            torch.ops.mkldnn, f"_is_mkldnn_{answer}_supported", lambda: supported, raising=True
        )
    place = {"backend": "gloo", "rank": 0, "world_size": 1, "local_rank": 0, "timeout_seconds": 1}
    runtime = Runtime(name=name, device=torch.device("cpu"), on_close=lambda _: None, **place)
    notes = runtime.dtype_notes(dtype)
    assert [f"leave --{dtype} out" in note for note in notes] == [True] * says
