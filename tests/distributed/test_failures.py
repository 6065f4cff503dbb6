"""What happens to a job when something happens to it: ranks, nodes and torchrun itself are lost.

Every job ends by itself within the seconds a test gives it, all of its processes with it.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from distributed.jobs import ROOT, Job, read_metrics, torchrun
from helpers import make_tiny_hugging_face_folder

WORKER = str(Path(__file__).with_name("steps_worker.py"))
PRETRAIN = str(ROOT / "launch" / "pretrain_qwen2.py")
TIMEOUT_SECONDS = 12
"""Time-out of the jobs that lose a rank; below a minute, and enough for a busy machine."""
END_SECONDS = TIMEOUT_SECONDS + 10
"""The time in which they have to end."""

pytestmark = pytest.mark.distributed


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def two_nodes(kind: str, options: str = "", address: str = "127.0.0.1") -> list[str]:
    """The options of two torchruns with a rank each that meet on this machine."""
    port = free_port()
    common = f"--nnodes 2 --nproc-per-node 1 {options}"
    if kind == "static":
        return [
            f"{common} --node-rank {n} --master-addr {address} --master-port {port}" for n in (0, 1)
        ]
    common += f" --rdzv-backend c10d --rdzv-endpoint {address}:{port} --rdzv-id {port}"
    return [f"{common} --local-addr {address}"] * 2


# --- restarts ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_hugging_face_folder(tmp_path_factory.mktemp("model") / "hf")


def pretraining(model: Path, folder: Path) -> list[str]:
    return (
        f"{PRETRAIN} --load {folder}/save --save {folder}/save --pretrained-checkpoint {model} "
        "--mock-data --seq-length 16 --global-batch-size 4 --train-iters 12 --save-interval 3 "
        "--lr 1e-3 --tensor-model-parallel-size 2 --device cpu --ckpt-format torch"
    ).split()


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of a job to which nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed")
    script = pretraining(model, folder)
    with torchrun(folder, script, "--standalone --nproc-per-node 2") as job:
        assert job.wait() == [0], job.log[-3000:]
    return losses(folder)


def losses(folder: Path) -> dict[int, float]:
    return {row["iteration"]: row["loss"] for row in read_metrics(folder / "save")}


@pytest.mark.parametrize(
    ("nodes", "kills"), [("one node", (1,)), ("c10d", (1, 0)), ("static", (0,))]
)
def test_a_killed_rank_is_replaced(
    nodes: str, kills: tuple[int, ...], model: Path, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    """torchrun keeps its store over a restart, and what earlier ranks have written there."""
    if nodes == "one node":
        options = ["--standalone --nproc-per-node 2 --max-restarts 3"]
    else:
        options = two_nodes(nodes, "--max-restarts 3")
    with torchrun(tmp_path, pretraining(model, tmp_path), *options) as job:
        for number, rank in enumerate(kills):
            job.wait_for_iteration(4 + 3 * number)
            os.kill(job.worker(rank), signal.SIGKILL)
        assert job.wait() == [0] * len(options), job.log[-3000:]
        assert job.log.count("resumed ") == len(kills), job.log[-3000:]
    assert losses(tmp_path) == undisturbed


# --- silence -------------------------------------------------------------------------------------


def steps(job: Job) -> int:
    return int(re.findall(r"^step (\d+)$", job.log, re.MULTILINE)[-1])


def ended_in_time(job: Job, since: float) -> None:
    """Nothing of the job is left, and no sooner than a rank may be late."""
    left = END_SECONDS - (time.monotonic() - since)
    job.wait_until(lambda: not job.ranks(), left)
    assert time.monotonic() - since > TIMEOUT_SECONDS - 1, job.log


@pytest.mark.parametrize(
    ("nodes", "silent"), [("--standalone --nproc-per-node 3", 1), ("static", 0), ("static", 1)]
)
def test_a_stopped_rank_is_named(nodes: str, silent: int, tmp_path: Path) -> None:
    """It is named also alone on its node, and beside torchrun's store."""
    options = two_nodes(nodes) if nodes == "static" else [nodes]
    with torchrun(tmp_path, [WORKER, str(TIMEOUT_SECONDS)], *options) as job:
        job.wait_for_text("step 5\n")
        stopped = job.worker(silent)
        begun = time.monotonic()
        os.kill(stopped, signal.SIGSTOP)
        ended_in_time(job, begun)
        last = steps(job)
        said = rf"rank {silent} on \S+ has not answered for {TIMEOUT_SECONDS} s; its last step was "
        found = re.search(said + r"(\d+)", job.log)
        assert found, job.log[-3000:]
        assert last - 12 <= int(found[1]) <= last
        for node in range(len(options)):
            complaints = re.findall(r"^error: .*", job.log_of(node), re.MULTILINE)
            assert len(complaints) <= 1, "each node says it once"
        assert "Traceback" not in job.log.split("FAILED")[0].replace("Traceback", "", len(options))


@pytest.fixture
def namespaces(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them, 10.93.7.1 and .2."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces are made by root, with the command ip")
    names = (f"q2a{os.getpid()}a", f"q2a{os.getpid()}b")

    def ip(words: str) -> None:
        subprocess.run(["ip", *words.split()], check=True, capture_output=True, timeout=20)

    try:
        try:
            for name in names:
                ip(f"netns add {name}")
            first, second = names
            ip(f"link add v0 netns {first} type veth peer name v1 netns {second}")
            for number, name in enumerate(names):
                ip(f"-n {name} addr add 10.93.7.{number + 1}/24 dev v{number}")
                ip(f"-n {name} link set v{number} up")
                ip(f"-n {name} link set lo up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr!r}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20)


def test_a_cut_cable_ends_both_nodes(namespaces: tuple[str, str], tmp_path: Path) -> None:
    address, port = "10.93.7.1", 29511
    options = [
        f"--nnodes 2 --nproc-per-node 2 --node-rank {n} --master-addr {address} "
        f"--master-port {port}"
        for n in (0, 1)
    ]
    prefixes = [["ip", "netns", "exec", name] for name in namespaces]
    environments = [["env", f"GLOO_SOCKET_IFNAME=v{number}"] for number in (0, 1)]
    prefixes = [[*a, *b] for a, b in zip(prefixes, environments, strict=True)]
    script = [WORKER, str(TIMEOUT_SECONDS)]
    with torchrun(tmp_path, script, *options, prefixes=prefixes) as job:
        job.wait_for_text("step 5\n")
        begun = time.monotonic()
        command = ["ip", "-n", namespaces[1], "link", "set", "v1", "down"]
        subprocess.run(command, check=True, timeout=20)
        job.wait_until(lambda: not job.ranks(), END_SECONDS)
        assert time.monotonic() - begun > TIMEOUT_SECONDS - 1
        seconds = rf"answered for {TIMEOUT_SECONDS} s"
        silent = rf"rank 2 on \S+, rank 3 on \S+ have not {seconds}; last steps: \d+, \d+"
        assert re.search(silent, job.log_of(0)), job.log_of(0)[-3000:]
        assert f"error: rank 0 on {address} has not {seconds}" in job.log_of(1), job.log


# --- ends ----------------------------------------------------------------------------------------


def test_nothing_outlives_torchrun(tmp_path: Path) -> None:
    """Ranks have sessions of their own, and their data loaders have workers."""
    with torchrun(tmp_path, [WORKER, "60"], "--standalone --nproc-per-node 2") as job:
        job.wait_for_text("step 5\n")
        assert len(job.ranks()) == 4, "two ranks, each with a worker"
        job.process.kill()
        job.wait_until(lambda: not job.running(), 10)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_torchrun_ends_all_ranks(number: signal.Signals, tmp_path: Path) -> None:
    with torchrun(tmp_path, [WORKER, "60"], "--standalone --nproc-per-node 2") as job:
        job.wait_for_text("step 5\n")
        job.process.send_signal(number)
        job.wait_until(lambda: not job.ranks(), 10)
        assert job.wait(20) != [0]
        assert job.log.count("Traceback") == 1, "torchrun's own"
        assert job.log.count("interrupted") == (number == signal.SIGINT)


def test_a_fault_on_one_rank_is_said_once_with_its_number(tmp_path: Path) -> None:
    """Where one node lacks a file, the others wait for a rank, and cannot see why."""
    log = failed(tmp_path, "absent", 2)
    assert log.count("error: rank 1: the file is not here;") == 1, log
    assert "traceback : error: the file is not here; copy it.\n" in log, log


def test_a_fault_of_all_ranks_is_said_once(tmp_path: Path) -> None:
    log = failed(tmp_path, "everywhere", 2)
    assert [line for line in log.splitlines() if line.startswith("error: ")] == [
        "error: the file is not here; copy it."
    ]
    assert log.count("exitcode  : ") == 1, log


def test_ranks_with_other_devices_are_named(tmp_path: Path) -> None:
    log = failed(tmp_path, "device", 2)
    said = re.findall("^error: what --device .*", log, re.MULTILINE)
    assert len(said) == 1, log
    assert "rank 0 on " in said[0] and "has 'cpu'" in said[0]
    assert "rank 1 on " in said[0] and "has 'cuda'" in said[0]


def failed(folder: Path, what: str, status: int) -> str:
    """What a job of two ranks has printed."""
    options = "--standalone --nproc-per-node 2"
    with torchrun(folder, [WORKER, str(TIMEOUT_SECONDS), what], options) as job:
        assert job.wait() == [1]
        assert not job.running()
        assert f"exitcode  : {status} " in job.log, job.log
        return job.log
