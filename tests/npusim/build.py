"""Builds the libraries that torch_npu looks for in CANN, from the installed wheel and csrc/.

The wheel carries the ACL and HCCL headers and names every operator it may call; that is all there
is to build from. A build takes about ten seconds and is kept under ~/.cache/qwen2-ascend.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).with_name("csrc")
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")

PRELOADED = "libtorch_keys.so"
LIBRARIES = (
    # name, what its objects' names begin with, what it needs
    ("libascendcl.so", ("acl_", "streams", "stubs"), ()),
    ("libopapi.so", ("opapi_", "trampolines"), ("ascendcl",)),
    ("libhccl.so", ("hccl_",), ("ascendcl",)),
    (PRELOADED, ("torch_",), ()),
)
EMPTY_LIBRARIES = {
    # Named by the wheel's libraries as needed, or opened by name for functions that are in others.
    "libge_runner.so": (),
    "libgraph.so": (),
    "libacl_tdt_channel.so": (),
    "libatb.so": ("ascendcl",),
    "libacl_op_compiler.so": ("ascendcl",),
    "libhcomm.so": ("hccl", "ascendcl"),
}

CANN_SYMBOL = re.compile(r"(acl|Msprof|rt[A-Z])\w+|_ZNK?3atb\w+")
# What has no error code to return: pointers are null, and nothing else than zero is expected.
RETURNS_ZERO = re.compile(
    r"aclopCreateAttr|aclCreateTensorDesc|aclCreateDataBuffer|acl(op)?Destroy\w+|Msprof\w+"
)
ACL_ERROR_INTERNAL_ERROR = 500000


class Unavailable(Exception):
    """Why the simulated device cannot be had on this machine."""


@dataclass(frozen=True)
class Wheel:
    """An installed torch_npu."""

    site: Path
    """The folder to put on PYTHONPATH."""
    version: str

    @property
    def folder(self) -> Path:
        return self.site / "torch_npu"


def find_wheel() -> Wheel:
    """The installed torch_npu, without importing it.

    It is looked for in the folder TORCH_NPU_SITE, in `npu-site` beside the environment's `bin`,
    and among the environment's own packages. A folder of its own is best: without CANN an
    importable torch_npu breaks `import transformers`.

    Raises:
        Unavailable: there is none, or its release is not torch's.
    """
    places = [os.environ.get("TORCH_NPU_SITE"), str(Path(sys.prefix) / "npu-site"), *sys.path]
    found = importlib.metadata.distributions(name="torch_npu", path=[p for p in places if p])
    for distribution in found:
        wheel = Wheel(Path(str(distribution.locate_file(""))).resolve(), distribution.version)
        _check_release(wheel.version)
        return wheel
    raise Unavailable(
        "torch_npu is not installed; `make npu-site` puts it into a folder of its own"
    )


def build(wheel: Wheel) -> Path:
    """The folder with the libraries, built now unless the same build is in the cache.

    Raises:
        Unavailable: this is no x86-64 Linux, a compiler is missing, or the wheel's headers do not
            fit the sources.
    """
    _check_machine()
    target = _cache_folder() / f"{wheel.version}-{_fingerprint(wheel)}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="building-") as scratch:
        _build_into(Path(scratch), wheel)
        try:
            os.rename(scratch, target)
        except OSError:
            assert target.exists(), "another process built the same at the same time"
        else:
            os.mkdir(scratch)  # TemporaryDirectory removes it
    return target


def _check_release(version: str) -> None:
    torch_version = importlib.metadata.version("torch")
    release = [re.split(r"[+]|\.post", v)[0] for v in (version, torch_version)]
    if release[0] != release[1]:
        raise Unavailable(f"torch_npu is {version} and torch {torch_version}: they must be equal")


def _check_machine() -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise Unavailable("the simulated device is for x86-64 Linux: its trampolines are assembly")
    if missing := [tool for tool in ("g++", "nm") if shutil.which(tool) is None]:
        raise Unavailable(f"{' and '.join(missing)} not found; install gcc and binutils")


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qwen2-ascend" / "npusim"


def _fingerprint(wheel: Wheel) -> str:
    digest = hashlib.sha256(wheel.version.encode())
    for path in [Path(__file__), *sorted(SOURCES.iterdir())]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _build_into(folder: Path, wheel: Wheel) -> None:
    (folder / "stubs.S").write_text(_stubs(_wanted_symbols(wheel)), encoding="ascii")
    (folder / "trampolines.S").write_text(_trampolines(_operators(wheel)), encoding="ascii")
    sources = [*_sources(wheel), *folder.glob("*.S")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = dict(pool.map(lambda source: _compile(source, folder, wheel), sources))
    for name, prefixes, needed in LIBRARIES:
        _link(folder, name, [objects[s] for s in objects if s.startswith(prefixes)], needed)
    for name, needed in EMPTY_LIBRARIES.items():
        _link(folder, name, [], needed)
    for leftover in [*folder.glob("*.o"), *folder.glob("*.S")]:
        leftover.unlink()


def _sources(wheel: Wheel) -> list[Path]:
    header = wheel.folder / "include" / "third_party" / "acl" / "inc" / "acl" / "acl_rt.h"
    newer = "aclrtDevResLimitType" in header.read_text(encoding="utf-8", errors="replace")
    return [s for s in SOURCES.glob("*.cpp") if newer or s.stem != "acl_runtime_newer"]


def _compile(source: Path, folder: Path, wheel: Wheel) -> tuple[str, Path]:
    include = wheel.folder / "include"
    target = folder / f"{source.stem}.o"
    headers = ("-isystem", include, "-isystem", include / "third_party" / "acl" / "inc")
    _run("g++", *FLAGS, *headers, "-c", source, "-o", target)
    return source.stem, target


def _link(folder: Path, name: str, objects: list[Path], needed: tuple[str, ...] = ()) -> None:
    # An empty library must still name those that have its functions: dlsym follows the names.
    libraries = ["-Wl,--no-as-needed", f"-L{folder}", *(f"-l{library}" for library in needed)]
    _run("g++", "-shared", f"-Wl,-soname,{name}", "-o", folder / name, *objects, *libraries)


def _run(*command: object) -> str:
    result = subprocess.run(
        [str(word) for word in command], check=False, capture_output=True, text=True, timeout=300
    )
    if result.returncode:
        raise Unavailable(f"{command[0]} failed:\n{result.stderr[-2000:]}")
    return result.stdout


def _libraries(wheel: Wheel) -> list[Path]:
    return [*wheel.folder.glob("*.so"), *(wheel.folder / "lib").glob("*.so")]


def _wanted_symbols(wheel: Wheel) -> list[str]:
    """CANN's functions that the wheel's libraries link against."""
    lines = _run("nm", "-D", "--undefined-only", *_libraries(wheel)).splitlines()
    names = {line.split()[-1].split("@")[0] for line in lines if line.strip()}
    return sorted(name for name in names if CANN_SYMBOL.fullmatch(name))


def _operators(wheel: Wheel) -> list[str]:
    """The aclnn functions that the wheel opens by name: two for each operator."""
    content = (wheel.folder / "lib" / "libtorch_npu.so").read_bytes()
    found = {name.decode() for name in re.findall(rb"\0(aclnn[A-Z]\w*)(?=\0)", content)}
    operators = {name.removesuffix("GetWorkspaceSize") for name in found}
    return sorted(operators | {f"{name}GetWorkspaceSize" for name in operators})


def _stubs(symbols: list[str]) -> str:
    """Functions that do nothing but report failure; weak, so that csrc/ overrides them."""
    lines = [".text"]
    for symbol in symbols:
        value = 0 if RETURNS_ZERO.fullmatch(symbol) else ACL_ERROR_INTERNAL_ERROR
        lines += [f".weak {symbol}", f".type {symbol},@function"]
        lines += [f"{symbol}:", f"movl ${value},%eax", "cltq", "ret"]
    return _assembly(lines)


def _trampolines(symbols: list[str]) -> str:
    """Each calls npusim_opapi_called(name, registers, float registers, stack)."""
    lines = [".text", ".hidden npusim_opapi_called"]
    for number, symbol in enumerate(symbols):
        lines += [f".globl {symbol}", f".type {symbol},@function"]
        lines += [f"{symbol}:", f"leaq .Lname{number}(%rip),%rax", "jmp .Lcommon"]
    registers = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
    lines += [".Lcommon:", "pushq %rbp", "movq %rsp,%rbp", "subq $112,%rsp"]
    lines += [f"movq %{name},{8 * n - 48}(%rbp)" for n, name in enumerate(registers)]
    lines += [f"movsd %xmm{n},{8 * n - 112}(%rbp)" for n in range(8)]
    lines += ["movq %rax,%rdi", "leaq -48(%rbp),%rsi", "leaq -112(%rbp),%rdx"]
    lines += ["leaq 16(%rbp),%rcx", "call npusim_opapi_called", "leave", "ret"]
    lines += [".section .rodata"]
    lines += [f'.Lname{number}: .asciz "{symbol}"' for number, symbol in enumerate(symbols)]
    return _assembly(lines)


def _assembly(lines: list[str]) -> str:
    return "\n".join([*lines, '.section .note.GNU-stack,"",@progbits', ""])
