"""The doctor finds what is wrong with made-up machines, says the way out, and never falls ill."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pythons
from qwen2_ascend.doctor import command, host, machine, megatron, python
from qwen2_ascend.doctor.command import examine
from qwen2_ascend.doctor.findings import Finding, ok, problem
from qwen2_ascend.doctor.machine import Machine

CHECKS = dict(command.CHECKS)


class Fake:
    """A machine in a folder: its /dev, /proc and /usr, its packages and its programs."""

    def __init__(self, folder: Path) -> None:
        self.root, self.packages, self.programs = (folder / n for n in ("root", "site", "bin"))
        for path in (self.root, self.packages, self.programs):
            path.mkdir()
        self.environ = {"PYTHONPATH": str(self.packages), "PATH": str(self.programs)}

    def file(self, path: str, text: str = "", mode: int = 0o644) -> Path:
        full = self.root / path.lstrip("/")
        full.parent.mkdir(parents=True, exist_ok=True)
        full.write_text(text)
        full.chmod(mode)
        return full

    def package(self, name: str, version: str | None, code: str = "", under: str = "") -> Path:
        """Installs a package: its metadata if `version`, and `code` as its __init__.py."""
        module = self.packages / under / name.replace("-", "_").replace(".", "/")
        module.mkdir(parents=True, exist_ok=True)
        (module / "__init__.py").write_text(code)
        if version is not None:
            self.metadata(name, version, under)
        return module

    def metadata(self, name: str, version: str, under: str = "") -> None:
        info = self.packages / under / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (info / "METADATA").write_text(text)

    def program(self, name: str, script: str) -> None:
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def check(self, name: str, **environ: str) -> list[Finding]:
        return list(CHECKS[name](Machine(self.root, {**self.environ, **environ})))

    def named(self, name: str, **environ: str) -> dict[str, Finding]:
        return {finding.name: finding for finding in self.check(name, **environ)}

    def only(self, name: str, **environ: str) -> Finding:
        (finding,) = self.check(name, **environ)
        return finding


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


TORCH = """
class version: cuda = {cuda!r}
class cuda:
    is_available = staticmethod(lambda: {available})
class npu:
    device_count = staticmethod(lambda: 2)
    is_available = staticmethod(lambda: True)
    get_device_name = staticmethod(lambda i: "Ascend910B3")
__version__ = "2.7.1"
"""
CPU_TORCH = TORCH.format(cuda=None, available=False)


# --- torch and torch_npu --------------------------------------------------------------------------


def test_a_cpu_build_is_fine(fake: Fake) -> None:
    fake.package("torch", "2.7.1+cpu", CPU_TORCH)
    assert fake.only("torch") == ("import torch", "ok", "works, CPU build", "")


def test_a_cuda_build_without_a_gpu_is_noted(fake: Fake) -> None:
    fake.package("torch", "2.7.1", TORCH.format(cuda="12.6", available=False))
    found = fake.only("torch")
    assert found.level == "note"
    assert "a CUDA 12.6 build and no CUDA device" in found.text
    assert "whl/cpu" in found.way_out


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("raise OSError('libtorch_cpu.so: cannot open shared object file')", "libtorch_cpu.so"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed (SIGSEGV)"),
        ("import sys; sys.exit(3)", "exit status 3"),
        ("print('not json')", "AttributeError"),
    ],
)
def test_a_torch_that_cannot_be_imported_is_a_problem(code: str, text: str, fake: Fake) -> None:
    fake.package("torch", "2.7.1", code)
    found = fake.only("torch")
    assert found.level == "problem"
    assert text in found.text
    assert found.way_out


def test_an_import_that_hangs_is_a_problem(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PROBE_SECONDS", 1)
    fake.package("torch", "2.7.1", "import time; time.sleep(60)")
    monkeypatch.setattr(Machine, "sys_path", [str(fake.packages)])
    found = fake.only("torch")
    assert (found.level, found.text) == ("problem", "gave no answer in 1 seconds")


@pytest.mark.parametrize("torch_npu", ["2.7.1", "2.7.1.post2"])
def test_torch_npu_that_fits_and_sees_devices_is_fine(torch_npu: str, fake: Fake) -> None:
    fake.package("torch", "2.7.1+cpu", CPU_TORCH)
    fake.package("torch_npu", torch_npu)
    found = fake.only("torch_npu")
    assert (found.level, found.text) == ("ok", "sees 2 x Ascend910B3")


def test_torch_npu_of_another_release_is_a_problem(fake: Fake) -> None:
    fake.package("torch", "2.8.0+cpu", CPU_TORCH)
    fake.package("torch_npu", "2.7.1.post1")
    found = fake.only("torch_npu")
    assert found.level == "problem"
    assert found.text == "2.7.1.post1 is for torch 2.7.1, torch is 2.8.0+cpu"
    assert 'pip install "torch==2.7.1"' in found.way_out


def test_a_missing_cann_is_a_problem_that_names_the_script(fake: Fake) -> None:
    fake.package("torch", "2.7.1", CPU_TORCH)
    fake.package("torch_npu", "2.7.1", "raise ImportError('libhccl.so: cannot open')")
    assert "CANN is not installed" in fake.only("torch_npu").way_out
    fake.file("/usr/local/Ascend/ascend-toolkit/set_env.sh")
    found = fake.only("torch_npu")
    assert found.level == "problem"
    assert "libhccl.so: cannot open" in found.text
    assert "source /usr/local/Ascend/ascend-toolkit/set_env.sh" in found.way_out


def test_torch_npu_that_crashes_beside_a_cuda_build_needs_the_cpu_build(fake: Fake) -> None:
    """2.14.0 of both crash so, once CANN is there."""
    fake.package("torch", "2.7.1", TORCH.format(cuda="13.0", available=False))
    fake.package("torch_npu", "2.7.1", "import os; os.abort()")
    found = fake.only("torch_npu")
    assert (found.level, found.text) == ("problem", "crashed (SIGABRT)")
    assert 'pip install "torch==2.7.1" --index-url' in found.way_out


def test_torch_npu_without_devices_is_a_problem(fake: Fake) -> None:
    fake.package("torch", "2.7.1", CPU_TORCH.replace("lambda: 2", "lambda: 0"))
    fake.package("torch_npu", "2.7.1")
    found = fake.only("torch_npu")
    assert (found.level, found.text) == ("problem", "works, and sees no device")


def test_npus_without_torch_npu_are_a_problem(fake: Fake) -> None:
    """The mistake that costs most: all would run, silently, on the CPU."""
    fake.package("torch", "2.7.1+cpu", CPU_TORCH)
    assert fake.only("torch_npu").level == "note"
    fake.file("/dev/davinci0")
    found = fake.only("torch_npu")
    assert found.level == "problem"
    assert 'pip install "torch_npu==2.7.1"' in found.way_out


# --- devices --------------------------------------------------------------------------------------


def test_no_npu_is_only_noted(fake: Fake) -> None:
    assert fake.only("NPU").level == "note"
    assert fake.check("npu-smi") == []
    assert fake.check("CANN") == []


def test_devices_are_counted(fake: Fake) -> None:
    for name in ("davinci0", "davinci1", "davinci10", "davinci_manager"):
        fake.file(f"/dev/{name}")
    assert fake.only("NPU") == ("NPU devices", "ok", "3 (/dev/davinci*)", "")
    found = fake.check("NPU", ASCEND_RT_VISIBLE_DEVICES="0,1")
    assert [finding.level for finding in found] == ["ok", "note"]
    for wrong in ("all", "0, 1", "1,0", "3"):
        found = fake.check("NPU", ASCEND_RT_VISIBLE_DEVICES=wrong)
        assert [finding.level for finding in found] == ["ok", "problem"], wrong


def test_a_container_without_the_manager_device_is_a_problem(fake: Fake) -> None:
    fake.file("/dev/davinci0")
    assert [finding.level for finding in fake.check("NPU")] == ["ok", "problem"]


def test_devices_of_another_group_are_a_problem(fake: Fake, monkeypatch) -> None:
    fake.file("/dev/davinci0")
    fake.file("/dev/davinci_manager")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may open everything
    found = fake.only("NPU")
    assert found.level == "problem"
    assert "HwHiAiUser" in found.way_out


def test_npu_smi_is_run(fake: Fake) -> None:
    fake.program("npu-smi", "echo '| npu-smi 24.1.rc2   Version: 24.1.rc2  |'")
    assert fake.only("npu-smi") == ("npu-smi", "ok", "works, driver 24.1.rc2", "")
    fake.program("npu-smi", "echo 'dcmi module initialize failed. ret is -8005' >&2; exit 255")
    found = fake.only("npu-smi")
    assert found.level == "problem"
    assert "dcmi module initialize failed" in found.text


def test_cann_and_whether_it_was_sourced(fake: Fake) -> None:
    home = "/usr/local/Ascend/ascend-toolkit/latest"
    fake.file("/dev/davinci0")
    found = fake.only("CANN")
    assert (found.level, found.way_out) == ("problem", "install CANN.")
    fake.file("/usr/local/Ascend/ascend-toolkit/set_env.sh")
    found = fake.only("CANN")
    assert (found.level, found.way_out[:11]) == ("problem", "run: source")
    assert fake.only("CANN", ASCEND_HOME_PATH=home).text.endswith("does not exist")
    fake.file(f"{home}/aarch64-linux/ascend_toolkit_install.info", "package=x\nversion=8.1.RC1\n")
    assert fake.only("CANN", ASCEND_HOME_PATH=home).text == f"8.1.RC1 in {home}"


def test_the_environment_of_a_run_is_shown(fake: Fake) -> None:
    assert fake.check("environment") == [], "without an NPU none of it is set"
    fake.package("torch_npu", "2.7.1")
    found = fake.named("environment", TASK_QUEUE_ENABLE="1")
    assert found["TASK_QUEUE_ENABLE"].text.startswith("1 (a run would set 2): ")
    assert found["CPU_AFFINITY_CONF"].text.startswith("a run sets 1: ")
    assert {"HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT", "PYTORCH_NPU_ALLOC_CONF"} <= set(found)
    left = fake.named("environment", PYTORCH_ALLOC_CONF="x")["PYTORCH_NPU_ALLOC_CONF"]
    assert left.text == "is left unset, because PYTORCH_ALLOC_CONF is set"


# --- megatron-core and MindSpeed ------------------------------------------------------------------


def install_megatron(
    fake: Fake, version: str, under: str = "", *, with_metadata: bool = True
) -> str:
    """A megatron.core as pip (with metadata) or a Megatron-LM tree (without) lays it out."""
    core = fake.package("megatron.core", None, f"__version__ = {version!r}", under)
    (core / "package_info.py").write_text(f"__version__ = {version!r}\n")
    (core / "datasets").mkdir()
    (core / "datasets" / "__init__.py").write_text("")
    if with_metadata:
        fake.metadata("megatron-core", version, under)
    return str(fake.packages / under)


def test_megatron_says_where_it_is_from(fake: Fake) -> None:
    folder = install_megatron(fake, "0.16.1")
    found = fake.named("megatron")
    assert found["megatron.core"].level == "ok"
    assert found["megatron.core"].text == f"0.16.1 from {folder}/megatron/core"
    assert found["import megatron.core"].level == "ok"


def test_a_tree_that_hides_pips_megatron_is_a_problem(fake: Fake) -> None:
    folder = install_megatron(fake, "0.16.1")
    tree = install_megatron(fake, "0.12.1", "Megatron-LM", with_metadata=False)
    paths = f"{tree}:{folder}"
    found = fake.named("megatron", PYTHONPATH=paths)
    assert found["megatron.core"].level == "problem"
    assert "0.12.1 in" in found["megatron.core"].text
    assert "hides pip's megatron-core 0.16.1" in found["megatron.core"].text


def test_a_tree_of_the_same_version_is_noted(fake: Fake) -> None:
    folder = install_megatron(fake, "0.12.1")
    tree = install_megatron(fake, "0.12.1", "Megatron-LM", with_metadata=False)
    fake.package("megatron.training", None, under="Megatron-LM")
    found = fake.named("megatron", PYTHONPATH=f"{tree}:{folder}")
    assert found["megatron.core"].level == "note"
    assert found["megatron.training"].level == "note"


def test_another_package_named_megatron_is_a_problem(fake: Fake) -> None:
    folder = install_megatron(fake, "0.16.1")
    fake.package("megatron", None, "", "other")
    paths = f"{fake.packages / 'other'}:{folder}"
    found = fake.only("megatron", PYTHONPATH=paths)
    assert found.level == "problem"
    assert "another `megatron` hides it" in found.text


def test_a_megatron_that_cannot_be_imported_is_a_problem(fake: Fake) -> None:
    install_megatron(fake, "0.16.1")
    path = fake.packages / "megatron" / "core" / "__init__.py"
    path.write_text("raise ImportError('cannot import name x from torch')")
    found = fake.named("megatron")
    assert found["import megatron.core"].level == "problem"
    assert "cannot import name x from torch" in found["import megatron.core"].text


def test_helpers_that_are_not_compiled_need_a_compiler(fake: Fake) -> None:
    install_megatron(fake, "0.16.1")
    assert fake.named("megatron")["helpers_cpp"].level == "problem"
    fake.program("c++", "true")
    assert fake.named("megatron")["helpers_cpp"].level == "note"
    (fake.packages / "megatron" / "core" / "datasets" / "helpers_cpp.py").write_text("")
    assert fake.named("megatron")["helpers_cpp"] == ("helpers_cpp", "ok", "compiled", "")


@pytest.mark.parametrize(
    ("mindspeed", "core", "level", "text"),
    [
        ("0.16.0", "0.16.1", "note", "0.16.0 in"),
        ("0.12.1", "0.12.1", "note", "0.12.1 in"),
        ("0.12.1", "0.16.1", "problem", "0.12.1 does not go with megatron-core 0.16.1"),
        ("0.16.0", "0.15.3", "problem", "no MindSpeed goes with megatron-core 0.15.3"),
        ("0.16.0", "0.17.0", "note", "0.16.0 is not used: megatron-core 0.17.0 goes with Megatron"),
    ],
)
def test_mindspeed_and_megatron_core_go_together(mindspeed, core, level, text, fake: Fake) -> None:
    install_megatron(fake, core)
    fake.package("torch", "2.7.1", CPU_TORCH)
    for name in ("einops", "scipy", "triton"):
        fake.package(name, "1.0")
    module = fake.package("mindspeed", mindspeed)
    (module / "megatron_adaptor.py").write_text("raise SystemExit('must not be imported')")
    found = fake.only("MindSpeed")
    assert found.level == level
    assert text in found.text
    assert ("core_r0.16.0" in found.way_out) is (level == "problem")


@pytest.mark.parametrize(
    ("core", "engine", "level", "text"),
    [
        ("0.18.2", True, "note", "is installed and not used: it is unproven"),
        ("0.18.2", False, "problem", "needs TransformerEngineNPU, which is not installed"),
        ("0.16.1", True, "note", "it is for megatron-core 0.17 and later, this is 0.16.1"),
    ],
)
def test_megatron_adaptor_is_named(core, engine, level, text, fake: Fake) -> None:
    install_megatron(fake, core)
    fake.package("torch", "2.7.1", CPU_TORCH)
    fake.package("megatron_adaptor", "0.18.0", "raise SystemExit('must not be imported')")
    if engine:
        fake.package("transformer_engine", "2.0")
    found = fake.only("MindSpeed")
    assert (found.name, found.level) == ("megatron_adaptor", level)
    assert text in found.text


def test_a_release_of_megatron_is_told_without_the_commit_of_the_folder(fake: Fake) -> None:
    """megatron-core since 0.18 appends that of whatever git tree it is installed in."""
    install_megatron(fake, "0.18.2")
    info = fake.packages / "megatron" / "core" / "package_info.py"
    info.write_text("__version__ = '0.18.2+1234abc'\n")
    found = fake.named("megatron")
    assert found["megatron.core"].text.startswith("0.18.2 from ")


def test_a_triton_that_is_missing_is_no_fault_of_megatron(fake: Fake) -> None:
    install_megatron(fake, "0.19.2")
    moe = fake.package("megatron.core.transformer.moe.ops", None)
    for folder in (moe.parent, moe.parent.parent):
        (folder / "__init__.py").write_text("")
    (moe / "paged_stash.py").write_text("import triton")
    core = fake.packages / "megatron" / "core" / "__init__.py"
    core.write_text("import megatron.core.transformer.moe.ops.paged_stash")
    found = fake.named("megatron")
    assert found["import megatron.core"].level == "ok"
    assert "triton is not installed, and nothing here uses it" in found["import megatron.core"].text


@pytest.mark.parametrize(
    ("running", "level"),
    [("3.10.1", "ok"), ("3.13.0", "ok"), ("3.14.0", "note"), ("3.9.2", "problem")],
)
def test_the_python_is_one_that_the_metadata_name(
    running: str, level: str, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(python.platform, "python_version", lambda: running)
    monkeypatch.setattr(python, "supported_pythons", lambda: ["3.10", "3.11", "3.12", "3.13"])
    assert fake.only("python").level == level


def test_make_test_pythons_takes_the_pythons_that_doctor_knows() -> None:
    assert python.supported_pythons() == pythons.named()
    metadata = importlib.metadata.metadata("qwen2-ascend")
    assert metadata["Requires-Python"] == f">={pythons.named()[0]}"


def test_mindspeeds_newer_branches_need_megatrons_training(fake: Fake) -> None:
    install_megatron(fake, "0.12.1")
    for name in ("einops", "scipy"):
        fake.package(name, "1.0")
    module = fake.package("mindspeed", "0.12.1")
    (module / "megatron_adaptor.py").touch()
    (module / "features_manager" / "qos").mkdir(parents=True)
    found = fake.only("MindSpeed")
    assert (found.level, found.text[:33]) == ("problem", "this MindSpeed is of the branches")
    assert "megatron.training" in found.text


def test_the_placeholder_named_mindspeed_is_a_problem(fake: Fake) -> None:
    install_megatron(fake, "0.16.1")
    fake.package("mindspeed", "0.0.1")
    found = fake.only("MindSpeed")
    assert found.level == "problem"
    assert "placeholder" in found.text


# --- packages and limits --------------------------------------------------------------------------


def test_packages_are_held_against_what_this_one_needs(fake: Fake, monkeypatch) -> None:
    needed = {"torch": ">=2.7", "megatron-core": "<0.17,>=0.12.1", "xxhash": ">=3.4", "tyro": ">=1"}
    monkeypatch.setattr(python, "requirements", lambda: needed)
    monkeypatch.setattr(Machine, "sys_path", [str(fake.packages), str(fake.packages / "user")])
    fake.package("torch", "2.6.0")
    fake.package("xxhash", "3.5.0")
    fake.package("xxhash", "3.4.0", under="user")
    fake.package("tyro", "1.0.17")
    fake.package("pyarrow", "20.0.0")
    found = fake.named("packages")
    assert found["torch"].level == "problem"
    assert found["torch"].way_out == 'pip install "torch>=2.7"'
    assert found["megatron-core"].text == "is not installed"
    assert found["xxhash"].level == "note"
    assert "3.5.0 in" in found["xxhash"].text
    assert "hides 3.4.0" in found["xxhash"].text
    assert found["tyro"].level == "ok"
    assert found["pyarrow"].level == "ok"


def test_requirements_are_this_packages_own() -> None:
    found = python.requirements()
    assert found["torch"].startswith(">=")
    assert "megatron-core" in found
    assert "pyarrow" not in found


def test_memory_and_its_limits(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.file("/proc/meminfo", "MemTotal: 33554432 kB\nMemAvailable:   16777216 kB\n")
    assert fake.only("memory").text == "16.0 GiB free"
    fake.file("/sys/fs/cgroup/memory.max", f"{8 * 2**30}\n")
    assert "this container may take 8.0 GiB" in fake.only("memory").text
    fake.file("/dev/shm/x")
    usage = type(host.shutil.disk_usage("/"))
    monkeypatch.setattr(host.shutil, "disk_usage", lambda _: usage(2**26, 0, 2**26))
    shm = fake.check("memory")[1]
    assert shm.level == "problem"
    assert "--shm-size" in shm.way_out


def test_low_limits_are_noted(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.resource, "getrlimit", lambda _: (256, 10_000))
    found = fake.only("limits")
    assert (found.level, found.way_out) == ("note", "ulimit -n 10000")


def test_leftovers_of_a_launcher_are_noted(fake: Fake) -> None:
    found = fake.check("network", WORLD_SIZE="8", RANK="0")
    assert any("RANK, WORLD_SIZE set outside of torchrun" in finding.text for finding in found)


# --- the whole ------------------------------------------------------------------------------------


@pytest.mark.parametrize("python", [sys.executable, "/no/such/python"])
def test_an_empty_machine_is_examined_to_the_end(python: str, fake: Fake) -> None:
    environ = {**fake.environ, "PYTHONNOUSERSITE": "1", "PYTHONHOME": "/nowhere"}
    findings = examine(Machine(fake.root, environ, python))
    assert {"python", "torch_npu", "NPU devices", "open files"} <= {f.name for f in findings}
    assert all(finding.way_out for finding in findings if finding.level == "problem")


def test_a_check_that_fails_is_a_finding(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(machine: Machine):
        raise KeyError("x")
        yield

    monkeypatch.setattr(command, "CHECKS", (("odd", broken), ("python", python.check_python)))
    odd, found = examine(Machine(fake.root))
    assert (odd.level, odd.text) == ("note", "could not be examined: KeyError: 'x'")
    assert found.level == "ok"


def test_report_and_json_say_the_same(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    findings = [ok("torch", "2.7.1"), problem("CANN", "is gone", "install it")]
    monkeypatch.setattr(command, "examine", lambda _: findings)
    with pytest.raises(SystemExit) as caught:
        command.main([])
    assert caught.value.code == 1
    assert capsys.readouterr().out.splitlines() == [
        "ok       torch  2.7.1",
        "PROBLEM  CANN   is gone",
        "                -> install it",
        "",
        "1 problem(s) found",
    ]
    with pytest.raises(SystemExit):
        command.main(["--json"])
    raw = json.loads(capsys.readouterr().out)
    assert raw["ok"] is False
    assert raw["findings"][1] == findings[1]._asdict()
    monkeypatch.setattr(command, "examine", lambda _: findings[:1])
    command.main([])
    assert capsys.readouterr().out.endswith("no problem found\n")


def test_doctor_needs_nothing_but_the_standard_library(fake: Fake, tmp_path: Path) -> None:
    """Property: it answers where every package is gone or broken."""
    for name in ("torch", "megatron", "tyro", "numpy"):
        fake.package(name, "0.0.1", "raise RuntimeError('broken')")
    source, copy = Path(command.__file__).parents[1], tmp_path / "qwen2_ascend"
    shutil.copytree(source / "doctor", copy / "doctor")
    (copy / "runtime").mkdir()
    tables = [
        f"runtime/{name}.py" for name in ("__init__", "diagnosis", "environment", "mindspeed")
    ]
    for name in ("__init__.py", "errors.py", "cli.py", "machine.py", "markdown.py", *tables):
        (copy / name).write_bytes((source / name).read_bytes())
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from qwen2_ascend.cli import main; sys.exit(main(['doctor', '--json']))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={**fake.environ, "PYTHONNOUSERSITE": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.stderr == ""
    assert done.returncode in (0, 1)
    assert json.loads(done.stdout)["findings"]


def test_no_file_of_the_working_folder_is_run(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no megatron-core, another package's package_info.py is none of its."""
    fake.package("megatron", None, "raise ImportError('gone')")
    (tmp_path / "package_info.py").write_text("__version__ = '9.9'")
    monkeypatch.chdir(tmp_path)
    found, error = Machine(fake.root, fake.environ).probe(megatron._FOLDERS)
    assert (error, found["core"], found.get("version")) == (None, None, None)
