"""Checks of the host: its memory, its limits, its name, and what a launcher has left."""

from __future__ import annotations

import re
import resource
import shutil
import socket
from collections.abc import Iterator

from qwen2_ascend.doctor.findings import Finding, note, ok, problem
from qwen2_ascend.doctor.machine import Machine
from qwen2_ascend.machine import TORCHRUN

SMALL_SHM_BYTES = 512 * 2**20
SMALL_OPEN_FILES = 4096
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check_memory(machine: Machine) -> Iterator[Finding]:
    available = re.search(r"^MemAvailable:\s+(\d+) kB", machine.read("/proc/meminfo"), re.MULTILINE)
    if available:
        free = int(available[1]) * 1024
        limits = (machine.read(path).strip() for path in CGROUP_LIMITS)
        limit = next((int(text) for text in limits if text.isdigit() and int(text) < 2**60), free)
        of_container = f", this container may take {_gb(limit)}" if limit < free else ""
        yield ok("memory", f"{_gb(free)} free{of_container}")
    if (shm := machine.file("/dev/shm")).is_dir():
        usage = shutil.disk_usage(shm)
        text = f"{_gb(usage.free)} of {_gb(usage.total)} free"
        if usage.free < SMALL_SHM_BYTES:
            yield problem(
                "/dev/shm",
                f"{text}; data workers and gloo put their buffers there",
                "start the container with --shm-size=16g or --ipc=host, or empty it.",
            )
        else:
            yield ok("/dev/shm", text)


def check_limits(machine: Machine) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < SMALL_OPEN_FILES:
        text = f"{soft} (ulimit -n); many ranks or many data files need more"
        wanted = min(hard, 65536) if hard > 0 else 65536
        yield note("open files", text, f"ulimit -n {wanted}")
    else:
        yield ok("open files", f"{soft} (ulimit -n)")


def check_network(machine: Machine) -> Iterator[Finding]:
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        text = f"{name} does not resolve; torchrun and gloo may wait for it or fail"
        yield note("host name", text, f"add it to /etc/hosts: 127.0.0.1 {name}")
    if left := [key for key in TORCHRUN if key in machine.environ]:
        text = f"{', '.join(left)} set outside of torchrun"
        yield note("environment", text, f"unset {' '.join(left)}")


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB"
