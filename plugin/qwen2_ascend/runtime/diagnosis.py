"""What is wrong with an NPU, and what to do: from the machine's state and from error texts.

The error texts are torch_npu's, CANN's and HCCL's, as their documents and users show them. The
standard library alone is imported here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

CANN_FOLDERS = ("cann", "ascend-toolkit", "nnae")
"""Folders of /usr/local/Ascend or ~/Ascend, each with a set_env.sh."""
DRIVER_LIBRARIES = ("libascend_hal", "libdrvdsmi", "libdcmi")
"""Those that come with the driver; CANN has the others."""


class KnownError(NamedTuple):
    """A text in an error of torch_npu, CANN or HCCL."""

    name: str
    """The code, or what it is about."""
    pattern: str
    """A regular expression that finds it, case aside."""
    cause: str
    way_out: str


KNOWN_ERRORS = (
    KnownError(
        "EI0006",
        r"EI0006|getting socket times out|wait socket establish timeout|get socket timeout",
        "the ranks did not find each other within HCCL_CONNECT_TIMEOUT ({connect} s): a rank has "
        "died or is late, or the network between the cards does not connect them",
        "look for the rank that reports something else, or nothing: its error is the cause. If "
        "every rank reports EI0006 at times more than {connect} s apart, ranks start too unevenly: "
        "raise --distributed-timeout-minutes. Otherwise check the cards' network on every node: "
        "`hccn_tool -i 0 -link -g`, `-ip -g`, `-tls -g` (the same TLS switch everywhere), and "
        "HCCL_SOCKET_IFNAME.",
    ),
    KnownError(
        "EI0002",
        r"EI0002|notify register (?:times out|has not received)|communication_error_timeout|"
        r"hccl.{0,80}execut\w+ time(?:s|d)? ?out|watchdog caught collective operation timeout",
        "a collective waited for another rank longer than HCCL_EXEC_TIMEOUT ({exec} s): that rank "
        "has died, is stuck, or is just slow (saving, first compilation of operators)",
        "look for the rank that reports something else; the text above may name it as remote rank "
        "or as abnormal device. If every rank lives, raise --distributed-timeout-minutes.",
    ),
    KnownError(
        "EI0004",
        r"EI0004|invalid ranktable",
        "HCCL was given a rank table that does not fit this job",
        "unset RANK_TABLE_FILE; torchrun needs none.",
    ),
    KnownError(
        "EI0005",
        r"EI0005|arguments? .{0,40}inconsistent between ranks",
        "the ranks called a collective with different sizes or types",
        "start every rank with the same flags, data and package versions on all nodes.",
    ),
    KnownError(
        "EI0001",
        r"EI0001",
        "HCCL found an environment variable it does not take",
        "the text above names it; unset it, or set what CANN's environment variable reference "
        "allows.",
    ),
    KnownError(
        "EI0007",
        r"EI0007",
        "HCCL could not get the memory or the streams it needs",
        "free device memory (see out of memory), or lower HCCL_BUFFSIZE, which each process group "
        "takes twice, in MB.",
    ),
    KnownError(
        "EJ0001",
        r"EJ0001|hccp.{0,60}init\w* fail",
        "HCCL's service on the card (hccp) did not start: mostly a process of an earlier run still "
        "holds the card",
        "wait some seconds, look for left-over processes with `npu-smi info` and end them.",
    ),
    KnownError(
        "missing processes",
        r"waiting for clients|\d+/\d+ clients joined",
        "not every process of the job came to the meeting point in time",
        "start torchrun on every node with the same --nnodes, --nproc-per-node, --master-addr and "
        "--master-port, and with its own --node-rank; that port of the first node must be "
        "reachable from each. A node whose process has died says why.",
    ),
    KnownError(
        "port in use",
        r"address already in use|(?:bind|listen)\w*[^\n]{0,60}port[^\n]{0,40}(?:fail|use)",
        "a port that this job needs is taken: by a run that has not ended, or another service",
        "end the left-over processes, choose another --master-port (torchrun) or HCCL_IF_BASE_PORT "
        "(HCCL; 60000 to 60015 without it).",
    ),
    KnownError(
        "out of memory",
        r"NPU out of memory|CUDA out of memory|error code is (?:207001|207018)|EL0004|"
        r"memory on the device is exhausted",
        "the device's memory does not hold what this layout needs",
        "smaller --micro-batch-size; --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1; --use-distributed-optimizer with more data parallel ranks; more "
        "tensor or pipeline parallel ranks, --sequence-parallel; shorter --seq-length. Where much "
        "more is reserved than allocated: PYTORCH_NPU_ALLOC_CONF=expandable_segments:True, and "
        "TASK_QUEUE_ENABLE=1, which needs less than 2. `npu-smi info` shows other processes on the "
        "card.",
    ),
    KnownError(
        "107001",
        r"error code is 107001|invalid device ID",
        "a process asked for a card that it does not see",
        "start as many processes as there are cards (--nproc-per-node), or correct "
        "ASCEND_RT_VISIBLE_DEVICES.",
    ),
    KnownError(
        "107002",
        r"error code is 107002|context is empty",
        "a thread used a card that no thread of its process had opened",
        "report it with the text above: it is a defect of this project or of torch_npu.",
    ),
    KnownError(
        "500001",
        r"error code is 500001|EZ9999|EE9999|E19999|EH9999|inner error",
        "an internal error of CANN; often an incomplete CANN (no operator package for this chip), "
        "or Python packages it needs are missing",
        "install CANN's toolkit and its operator package (kernels or ops) of one version for this "
        "chip, and `pip install decorator attrs psutil cffi pyyaml protobuf scipy requests "
        "absl-py`; the device's own log is in ~/ascend/log.",
    ),
    KnownError(
        "ERR02200",
        r"ERR02200|DIST call hccl api failed|HCCL function error",
        "HCCL refused or failed a call",
        "a code that starts with EI in the text above says more; the device's own log is in "
        "~/ascend/log.",
    ),
)
"""The first that fits counts: specific ones come before general ones."""


def explain(text: str, environ: Mapping[str, str]) -> str | None:
    """What an error text of the NPU's software means and what to do, or None when it is unknown."""
    for known in KNOWN_ERRORS:
        if re.search(known.pattern, text, re.IGNORECASE):
            seconds = {
                "connect": environ.get("HCCL_CONNECT_TIMEOUT", "120"),
                "exec": environ.get("HCCL_EXEC_TIMEOUT", "1836"),
            }
            sentence = f"{known.name}: {known.cause}; way out: {known.way_out}"
            return sentence.format_map(seconds)
    return None


def import_fault(error: str, environ: Mapping[str, str], root: Path = Path("/")) -> str:
    """Why torch_npu cannot be imported, and what to do.

    Args:
        error: what the import said.
        environ: the environment of the process.
        root: where the machine's files are; tests give another.
    """
    library = re.search(r"(lib[\w.+-]+\.so[\w.]*)", error)
    if "undefined symbol" in error:
        return (
            f"torch_npu does not fit CANN ({error}); install the CANN of torch_npu's release: the "
            "table is in docs/npu.md."
        )
    if library and library[1].startswith(DRIVER_LIBRARIES):
        return (
            f"the driver's {library[1]} is not found; install the NPU driver, or give the "
            "container /usr/local/Ascend/driver and /usr/local/dcmi, and have "
            "/usr/local/Ascend/driver/lib64 in LD_LIBRARY_PATH (set_env.sh puts it there)."
        )
    if library or "ASCEND_HOME_PATH" in error:
        return _cann_fault(library[1] if library else "CANN", environ, root)
    return f"torch_npu cannot be imported ({error})."


def _cann_fault(library: str, environ: Mapping[str, str], root: Path) -> str:
    home = environ.get("ASCEND_HOME_PATH") or environ.get("ASCEND_TOOLKIT_HOME")
    scripts = set_env_scripts(environ, root)
    if home is None and scripts:
        return f"{library} is not found: CANN is installed and not set up; source {scripts[0]}."
    if home is None:
        return (
            f"{library} is not found: CANN is not installed where it is looked for "
            "(/usr/local/Ascend, ~/Ascend); install it, then source its set_env.sh."
        )
    if not (root / home.lstrip("/")).is_dir():
        again = f"source {scripts[0]}" if scripts else "install CANN"
        return f"ASCEND_HOME_PATH={home} does not exist any more; {again}."
    return (
        f"{library} is not found, though ASCEND_HOME_PATH={home}: source its set_env.sh in this "
        "shell (LD_LIBRARY_PATH), or install the CANN package that has it: toolkit, ops or "
        "kernels, and nnal for libatb."
    )


_LOST_CONNECTION = re.compile(
    r"gloo|nccl|hccl|connection (?:was )?(?:closed|reset|refused|aborted)|broken pipe|"
    r"time[sd]? ?out|EI000[26]",
    re.IGNORECASE,
)


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error may come of another rank that does not answer.

    torch's own exceptions for it are known by name here, and by their texts those of the backends.
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    if "DistError" in names:
        return True
    return isinstance(error, RuntimeError) and bool(_LOST_CONNECTION.search(str(error)))


def has_timed_out(error: BaseException) -> bool:
    """Whether an error of communication came after its time-out, not at once."""
    return bool(re.search(r"time[sd]? ?out", str(error), re.IGNORECASE))


def set_env_scripts(environ: Mapping[str, str], root: Path = Path("/")) -> list[str]:
    """Every set_env.sh of a CANN in its usual places."""
    home = environ.get("HOME", "/root")
    places = [f"{base}/Ascend/{kind}" for base in ("/usr/local", home) for kind in CANN_FOLDERS]
    paths = [f"{place}/set_env.sh" for place in places]
    return [path for path in paths if (root / path.lstrip("/")).exists()]


def no_device_fault(environ: Mapping[str, str], root: Path = Path("/")) -> str:
    """Why torch_npu can be imported and sees no device."""
    devices = sorted(root.glob("dev/davinci[0-9]*"))
    if fault := visible_devices_fault(environ, len(devices) or None):
        return fault
    if not devices:
        return (
            "torch_npu sees no device, and there is no /dev/davinci*: the driver is not loaded "
            "(`npu-smi info`), or the container was not given its cards: --device /dev/davinci0 "
            "... --device /dev/davinci_manager --device /dev/devmm_svm --device /dev/hisi_hdc."
        )
    return (
        f"torch_npu sees no device, though there are {len(devices)} (/dev/davinci*): check that "
        "`npu-smi info` works, that this user is in the group HwHiAiUser, and that the container "
        "has /dev/davinci_manager, /dev/devmm_svm and /dev/hisi_hdc."
    )


def visible_devices_fault(environ: Mapping[str, str], count: int | None) -> str | None:
    """What is wrong with ASCEND_RT_VISIBLE_DEVICES, or None.

    CANN reads numbers up to the first character that is neither a digit nor a comma, and forgets
    the rest without a word; the numbers have to rise.

    Args:
        environ: the environment of the process.
        count: cards of this machine, or None when nobody knows.
    """
    value = environ.get("ASCEND_RT_VISIBLE_DEVICES")
    if value is None:
        return None
    start = f"ASCEND_RT_VISIBLE_DEVICES={value!r}"
    if not re.fullmatch(r"\d+(,\d+)*", value):
        return (
            f"{start}: CANN reads it up to the first character that is neither a digit nor a "
            "comma; write numbers and commas alone, as in 0,1,2,3, or unset it."
        )
    numbers = [int(number) for number in value.split(",")]
    if numbers != sorted(set(numbers)):
        return f"{start}: the numbers have to rise, as in 0,1,2,3."
    if count is not None and numbers[-1] >= count:
        return f"{start}: this machine has the cards 0 to {count - 1}."
    return None


def has_driver(root: Path = Path("/")) -> bool:
    """Whether an Ascend driver shows this process any device."""
    return (root / "dev/davinci_manager").exists() or any(root.glob("dev/davinci[0-9]*"))
