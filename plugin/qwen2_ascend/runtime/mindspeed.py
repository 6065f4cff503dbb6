"""MindSpeed, when it is wanted: whether it fits, and how it is activated.

Nothing here needs it: the layers call torch_npu's operators themselves. What it adds are Ascend's
rewrites of megatron-core around them (the vocabulary's embedding and cross entropy, gradient
buckets, the softmax of unfused attention). It replaces about a hundred attributes of torch and
megatron-core, so it is activated before megatron-core is imported, or not at all.

From megatron-core 0.17 on its place is taken by MegatronAdaptor with TransformerEngineNPU, which
`--mindspeed` activates there. Neither has been run with this project, so it is never taken
unasked.

At import this module needs the standard library alone.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import runpy
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qwen2_ascend.errors import Lines, UserError
from qwen2_ascend.markdown import aligned


class Branch(NamedTuple):
    """One branch of MindSpeed's repository, and what it goes with."""

    name: str
    version: str
    """What `setup.py` says, and so pip: the same for several branches."""
    megatron_core: str
    """Release: "0.16" is any 0.16.x."""
    torch: tuple[str, ...]
    torch_npu: str
    """Version of the release train, as its documents count."""
    cann: str
    python: str
    needs_training: bool = False
    """Whether `megatron.training` must be there, which pip's megatron-core does not have."""


BRANCHES = (
    Branch("core_r0.16.0", "0.16.0", "0.16", ("2.7.1",), "26.0.0", "9.0.0", "3.10"),
    Branch("2.3.0_core_r0.12.1", "0.12.1", "0.12", ("2.6.0", "2.7.1"), "7.3.0", "8.5.0", "3.10"),
    Branch("26.0.0_core_r0.12.1", "0.12.1", "0.12", ("2.7.1",), "26.0.0", "9.0.0", "3.10", True),
    Branch("26.1.0_core_r0.12.1", "0.12.1", "0.12", ("2.7.1",), "26.1.0", "9.0.0", "3.10", True),
)
"""What MindSpeed's own README and installation pages say, and which release of megatron-core."""

NEEDED_PACKAGES = ("einops", "scipy")
"""The requirements of MindSpeed that its import fails without."""
NEEDED_BY_NEWER = ("triton",)
"""The same, from core_r0.16.0 on; for Ascend it is in the package triton-ascend."""


ADAPTOR_SINCE = (0, 17)
"""The first megatron-core that MegatronAdaptor is for, and no MindSpeed."""


class Installed(NamedTuple):
    """The `mindspeed` that would be imported, found without importing it."""

    folder: Path
    version: str | None
    """None where neither pip nor a setup.py beside it says one."""
    is_placeholder: bool
    """The package of that name on the Python package index: no MindSpeed at all."""
    is_train_26: bool
    """Whether it is of the branches 26.x and master, which share a version with 2.3.0."""


class Adaptor(NamedTuple):
    """The `megatron_adaptor` that would be imported, found without importing it."""

    folder: Path
    version: str | None
    """None where pip does not know it."""
    has_transformer_engine: bool
    """Whether a `transformer_engine` is there: TransformerEngineNPU has NVIDIA's name."""


class Stack(NamedTuple):
    """Releases that MindSpeed has to go with."""

    megatron_core: str
    torch: str
    has_training: bool
    missing: tuple[str, ...]
    """Packages that MindSpeed imports and that are not there."""


class Choice(NamedTuple):
    """Whether MindSpeed, or what took its place, is going to be activated, and why."""

    active: bool
    why: str
    package: Literal["mindspeed", "megatron_adaptor"] = "mindspeed"


# --- what is there --------------------------------------------------------------------------------


def find() -> Installed | None:
    """The MindSpeed of this Python, or None."""
    folder = _folder("mindspeed")
    return folder and inspect_folder(folder, _metadata_version("mindspeed"))


def find_adaptor() -> Adaptor | None:
    """The MegatronAdaptor of this Python, or None."""
    folder = _folder("megatron_adaptor")
    return folder and Adaptor(
        folder=folder,
        version=_metadata_version("megatron_adaptor"),
        has_transformer_engine=importlib.util.find_spec("transformer_engine") is not None,
    )


def _folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def inspect_folder(folder: Path, version: str | None) -> Installed:
    """What the package in `folder` is; `version` is pip's, if pip knows it."""
    setup = folder.parent / "setup.py"
    if version is None and setup.is_file():
        said = re.search(r"__version__ *= *['\"]([\w.]+)", setup.read_text(encoding="utf-8"))
        version = said[1] if said else None
    return Installed(
        folder=folder,
        version=version,
        is_placeholder=not (folder / "megatron_adaptor.py").is_file(),
        is_train_26=(folder / "features_manager" / "qos").is_dir(),
    )


def current_stack(torch_version: str) -> Stack:
    """This Python's, without importing megatron-core."""
    core = importlib.util.find_spec("megatron.core")
    version = _metadata_version("megatron-core") or ""
    if core and core.origin:  # a Megatron-LM tree on PYTHONPATH hides pip's
        info = Path(core.origin).with_name("package_info.py")
        version = str(runpy.run_path(str(info))["__version__"]) if info.is_file() else version
    return Stack(
        # since 0.18 it has the commit of whatever git tree it lies in behind a plus
        megatron_core=version.partition("+")[0],
        torch=release(torch_version),
        has_training=importlib.util.find_spec("megatron.training") is not None,
        missing=tuple(
            name
            for name in (*NEEDED_PACKAGES, *NEEDED_BY_NEWER)
            if importlib.util.find_spec(name) is None
        ),
    )


def release(version: str) -> str:
    """The three numbers of a version, which releases are matched by.

    2.7.1.post2, 2.7.1rc1, 2.7.1a0+git1 and 2.7.1+cpu are of release 2.7.1.
    """
    from packaging.version import InvalidVersion, Version  # `doctor` runs where it is missing

    try:
        numbers = Version(version).release
    except InvalidVersion:
        return version
    return ".".join(map(str, (*numbers, 0, 0)[:3]))


def _metadata_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- does it fit ----------------------------------------------------------------------------------


def fault(installed: Installed, stack: Stack) -> str | None:
    """Why this MindSpeed cannot work with this stack, or None."""
    core = stack.megatron_core
    if installed.is_placeholder:
        return (
            f"{installed.folder} has no megatron_adaptor: the package `mindspeed` on the Python "
            "package index is a placeholder; install MindSpeed from its source repository "
            "(Ascend/MindSpeed)."
        )
    branches = [b for b in BRANCHES if core.startswith(f"{b.megatron_core}.")]
    if not branches:
        return f"no MindSpeed goes with megatron-core {core}.\n{table()}"
    if installed.version and installed.version not in {b.version for b in branches}:
        return f"MindSpeed {installed.version} does not go with megatron-core {core}.\n{table()}"
    if installed.is_train_26 and not stack.has_training:
        return (
            "this MindSpeed is of the branches 26.x, which need megatron.training: put the "
            "Megatron-LM tree core_v0.12.1 on PYTHONPATH, or install the branch "
            "2.3.0_core_r0.12.1, which needs only megatron-core."
        )
    needed = NEEDED_PACKAGES + (NEEDED_BY_NEWER if core.startswith("0.16.") else ())
    if missing := [name for name in stack.missing if name in needed]:
        return (
            f"MindSpeed imports {', '.join(missing)}, which is not installed; install MindSpeed's "
            "requirements.txt (triton is in triton-ascend)."
        )
    return None


def table() -> str:
    """The pairs that go together, as lines."""
    rows = [("MindSpeed branch", "megatron-core", "torch", "torch_npu", "CANN", "Python")]
    for b in BRANCHES:
        core = f"{b.megatron_core}.x" + (" + megatron.training" if b.needs_training else "")
        rows.append((b.name, core, ", ".join(b.torch), b.torch_npu, b.cann, b.python))
    return "\n".join(f"  {line}" for line in aligned(rows, "l"))


def choose(
    requested: bool | None,
    device: str,
    installed: Installed | None,
    stack: Stack,
    adaptor: Adaptor | None = None,
) -> Choice:
    """Whether to activate MindSpeed, or MegatronAdaptor with a megatron-core that it is for.

    Asked for, everything that can work is taken. By itself MindSpeed is taken only with the torch
    that its documents name: it replaces parts of torch and megatron-core by name.

    Args:
        requested: True for --mindspeed, False for --no-mindspeed, None for neither.
        device: cpu, cuda or npu.
        installed: what `find` found.
        stack: what `current_stack` found.
        adaptor: what `find_adaptor` found.

    Raises:
        UserError: it is asked for and cannot work.
    """
    if requested is False:
        return Choice(False, "refused by --no-mindspeed")
    if device != "npu":
        if requested:
            raise UserError(f"--mindspeed: MindSpeed is for device npu; this run is on {device}.")
        return Choice(False, f"is for device npu, not {device}")
    if needs_adaptor(stack.megatron_core):
        return _choose_adaptor(requested, adaptor, stack)
    return _choose_mindspeed(requested, installed, stack)


def _choose_mindspeed(requested: bool | None, installed: Installed | None, stack: Stack) -> Choice:
    """`choose` on an npu with a megatron-core that MindSpeed is for."""
    if installed is None:
        if requested:
            raise UserError(
                Lines(
                    "--mindspeed: MindSpeed is not installed; install it from its source "
                    f"repository (Ascend/MindSpeed), of the branch that fits:\n{table()}"
                )
            )
        return Choice(False, "is not installed; the layers call torch_npu themselves")
    wrong = fault(installed, stack)
    if wrong and requested:
        raise UserError(Lines(f"--mindspeed: {wrong}"))
    if wrong:
        return Choice(False, f"is installed and not used: {wrong.splitlines()[0]}")
    known = {
        torch
        for b in BRANCHES
        if stack.megatron_core.startswith(b.megatron_core)
        for torch in b.torch
    }
    what = f"{installed.version or 'of unknown version'} in {installed.folder}"
    if stack.torch not in known:
        named = " or ".join(sorted(known))
        if requested:
            return Choice(True, f"{what}, asked for; it names torch {named}, this is {stack.torch}")
        return Choice(
            False,
            f"is installed and not used: it names torch {named}, this is {stack.torch}; "
            "--mindspeed takes it all the same",
        )
    return Choice(
        True, f"{what}, {'asked for' if requested else 'found; --no-mindspeed refuses it'}"
    )


def needs_adaptor(megatron_core: str) -> bool:
    """Whether MegatronAdaptor is for this megatron-core, and no MindSpeed."""
    numbers = tuple(int(number) for number in release(megatron_core).split(".") if number.isdigit())
    return numbers[:2] >= ADAPTOR_SINCE


def adaptor_fault(adaptor: Adaptor | None, megatron_core: str) -> str | None:
    """Why MegatronAdaptor cannot be activated, or None."""
    if adaptor is None:
        branch = "core_r" + ".".join(megatron_core.split(".")[:2]) + ".0"
        return (
            f"megatron-core {megatron_core} goes with MegatronAdaptor and TransformerEngineNPU in "
            "place of MindSpeed, and MegatronAdaptor is not installed; install both from their "
            f"source repositories (gitcode.com/Ascend), MegatronAdaptor of the branch {branch}."
        )
    if not adaptor.has_transformer_engine:
        return (
            f"MegatronAdaptor in {adaptor.folder} needs TransformerEngineNPU, which is not "
            "installed; install it from its source repository "
            "(gitcode.com/Ascend/TransformerEngineNPU)."
        )
    return None


def _choose_adaptor(requested: bool | None, adaptor: Adaptor | None, stack: Stack) -> Choice:
    """It is taken only when it is asked for."""
    wrong = adaptor_fault(adaptor, stack.megatron_core)
    if wrong and requested:
        raise UserError(f"--mindspeed: {wrong}")
    if adaptor is None:
        return Choice(False, "is not installed; the layers call torch_npu themselves")
    what = f"MegatronAdaptor {adaptor.version or 'of unknown version'} in {adaptor.folder}"
    if requested:
        return Choice(True, f"{what}, asked for; unproven with this project", "megatron_adaptor")
    return Choice(False, f"{what} is installed and not used: it is unproven; --mindspeed takes it")


# --- activation -----------------------------------------------------------------------------------


def activate(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Lets MindSpeed patch torch and megatron-core.

    Args:
        arguments: of Megatron's arguments those that MindSpeed is to know, by their names; the
            rest are MindSpeed's defaults. It never sees our command line.

    Returns:
        Every attribute that it has replaced, as `module.attribute`.

    Raises:
        UserError: it cannot be imported. Parts of torch may have been replaced by then.
    """
    os.environ.setdefault("MIND_SPEED_LOG_LEVEL", "ERROR")
    with _activating("MindSpeed", "requirements.txt"):
        args_utils: Any = importlib.import_module("mindspeed.args_utils")
        namespace = args_utils.get_mindspeed_args(get_defaults=True)
        vars(namespace).update(arguments)
        args_utils._MINDSPEED_ARGS = namespace  # else it parses sys.argv
        importlib.import_module("mindspeed.megatron_adaptor")
    manager = importlib.import_module("mindspeed.patch_utils").MindSpeedPatchesManager
    return tuple(name for name, patch in manager.patches_info.items() if patch.is_applied)


def activate_adaptor() -> None:
    """Lets MegatronAdaptor patch torch and megatron-core, which its import does.

    Raises:
        UserError: it cannot be imported. Parts of torch may have been replaced by then.
    """
    with _activating("MegatronAdaptor", "requirements"):
        importlib.import_module("megatron_adaptor")


def relied_on(patched: Sequence[str]) -> tuple[str, ...]:
    """The replacements by MindSpeed that a run of this project goes through."""
    return tuple(
        name
        for name in patched
        if name.startswith(("torch.", "megatron.core.", "apex.optimizers"))
        and not re.search(r"\.(moe|ssm|multimodal|extensions|experimental\w*)\.|MLA|llava", name)
    )


@contextmanager
def _activating(what: str, requirements: str) -> Iterator[None]:
    """Hides the command line and warnings; raises UserError where an import in the block fails."""
    assert not any(name.startswith("megatron.core") for name in sys.modules), (
        "comes before megatron"
    )
    saved = sys.argv
    sys.argv = sys.argv[:1]
    try:
        with warnings.catch_warnings(record=True):
            yield
    except (ImportError, AttributeError, OSError) as error:
        raise UserError(
            f"{what} cannot be activated ({type(error).__name__}: {error}); install its "
            f"{requirements} and the CANN of its branch, or refuse it with --no-mindspeed."
        ) from error
    finally:
        sys.argv = saved
