"""Checks of NPUs: torch_npu, the devices, the driver, CANN, and the environment of a run."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator

from qwen2_ascend.doctor.findings import Finding, note, ok, problem
from qwen2_ascend.doctor.machine import Machine, last_line
from qwen2_ascend.doctor.python import TORCH_PROBE, cpu_build
from qwen2_ascend.runtime import diagnosis, environment
from qwen2_ascend.runtime.mindspeed import release

CANN_FOLDERS = (".", "aarch64-linux", "x86_64-linux")
"""Where under CANN's home it says its version."""

_TORCH_NPU = """
import json, torch, torch_npu
print(json.dumps([torch.npu.get_device_name(i) for i in range(torch.npu.device_count())]))
"""


def check_torch_npu(machine: Machine) -> Iterator[Finding]:
    ours, theirs = machine.version("torch"), machine.version("torch_npu")
    if theirs is None:
        if machine.davinci_devices:
            wanted = release(ours) if ours else "the release of torch"
            yield problem(
                "torch_npu",
                "is not installed, and this machine has NPUs; everything would run on the CPU",
                f'pip install "torch_npu=={wanted}" (both releases must be equal)',
            )
        else:
            yield note("torch_npu", "is not installed; runs on the CPU")
        return
    if ours is not None and release(ours) != release(theirs):
        yield problem(
            "torch_npu",
            f"{theirs} is for torch {release(theirs)}, torch is {ours}",
            f'pip install "torch=={release(theirs)}", or the torch_npu of {release(ours)}',
        )
        return
    names, error = machine.probe(_TORCH_NPU)
    if error:
        why = diagnosis.import_fault(error, machine.environ, machine.root)
        is_crash = error.startswith("crashed")
        if is_crash and (torch := machine.probe(TORCH_PROBE)).answer and torch.answer["cuda"]:
            # both register allocator settings of the same names, which ends the process
            why = f"torch_npu and torch's CUDA build cannot be together; {cpu_build(machine)}"
        yield problem("import torch_npu", error, why)
    elif not names:
        why = diagnosis.no_device_fault(machine.environ, machine.root)
        yield problem("import torch_npu", "works, and sees no device", why)
    else:
        yield ok("import torch_npu", f"sees {len(names)} x {', '.join(sorted(set(names)))}")


def check_devices(machine: Machine) -> Iterator[Finding]:
    devices = machine.davinci_devices
    if not devices:
        yield note("NPU devices", "none (/dev/davinci*)")
    elif denied := [path for path in devices if not os.access(path, os.R_OK | os.W_OK)]:
        yield problem(
            "NPU devices",
            f"{len(denied)} of {len(devices)} may not be opened by this user ({denied[0]})",
            "join the group that owns them: usermod -a -G HwHiAiUser $USER, and log in again.",
        )
    else:
        yield ok("NPU devices", f"{len(devices)} (/dev/davinci*)")
    if devices and not machine.file("/dev/davinci_manager").exists():
        yield problem(
            "NPU devices",
            "/dev/davinci_manager is missing",
            "give it to the container: --device /dev/davinci_manager --device "
            "/dev/devmm_svm --device /dev/hisi_hdc",
        )
    visible = machine.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    if fault := diagnosis.visible_devices_fault(machine.environ, len(devices) or None):
        name, _, rest = fault.partition(": ")
        yield problem("NPU devices", f"{name} is wrong", rest)
    elif visible is not None:
        yield note("NPU devices", f"ASCEND_RT_VISIBLE_DEVICES={visible} hides the others")


def check_npu_smi(machine: Machine) -> Iterator[Finding]:
    program = machine.program("npu-smi")
    if program is None:
        if machine.davinci_devices:
            text = "is not on PATH; power cannot be measured"
            yield note("npu-smi", text, "add the driver's tools.")
        return
    try:
        done = machine.run([program, "info"], 30)
    except subprocess.TimeoutExpired:
        yield problem("npu-smi", "hangs", "the driver does not answer; look at dmesg.")
        return
    if done.returncode:
        text = last_line(done.stderr) or last_line(done.stdout) or "no message"
        way_out = "the driver is not loaded, or not for this kernel."
        yield problem("npu-smi", f"fails: {text}", way_out)
        return
    version = re.search(r"Version:\s*([\w.]+)", done.stdout)
    yield ok("npu-smi", f"works{f', driver {version[1]}' if version else ''}")


def check_cann(machine: Machine) -> Iterator[Finding]:
    home = machine.environ.get("ASCEND_HOME_PATH") or machine.environ.get("ASCEND_TOOLKIT_HOME")
    needed = bool(machine.davinci_devices) or machine.version("torch_npu") is not None
    scripts = diagnosis.set_env_scripts(machine.environ, machine.root)
    if home is None:
        if needed or scripts:
            way_out = f"run: source {scripts[0]}" if scripts else "install CANN."
            level = problem if needed else note
            yield level("CANN", "ASCEND_HOME_PATH is not set; set_env.sh was not sourced", way_out)
        return
    if not machine.file(home).is_dir():
        yield problem("CANN", f"ASCEND_HOME_PATH={home} does not exist", "source set_env.sh again.")
        return
    files = (f"{home}/{folder}/ascend_toolkit_install.info" for folder in CANN_FOLDERS)
    version = re.search(r"^version=(\S+)", "".join(map(machine.read, files)), re.MULTILINE)
    yield ok("CANN", f"{version[1] if version else 'version unknown'} in {home}")


def check_environment(machine: Machine) -> Iterator[Finding]:
    """What a run on an NPU sets, or leaves because it is set."""
    if machine.version("torch_npu") is None and not machine.davinci_devices:
        return
    for variable in environment.wanted(600):
        found = machine.environ.get(variable.name)
        ruled_out = [name for name in variable.unless if name in machine.environ]
        if found is not None:
            yield ok(variable.name, f"{found} (a run would set {variable.value}): {variable.why}")
        elif ruled_out:
            yield ok(variable.name, f"is left unset, because {ruled_out[0]} is set")
        else:
            yield ok(variable.name, f"a run sets {variable.value}: {variable.why}")
