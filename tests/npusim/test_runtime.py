"""The runtime on a simulated device: what torch_npu's host code says is explained, bits repeat."""

from __future__ import annotations

import json
import os
import subprocess
import textwrap
from pathlib import Path

import pytest

from helpers import make_tiny_hugging_face_folder
from npusim.build import Unavailable
from npusim.env import environment
from npusim.run import command
from runtime.test_deterministic import LAUNCH, trained

ONE_CARD = """
    import json, os, warnings, torch
    filters = list(warnings.filters)
    from qwen2_ascend import runtime

    running = runtime.start("npu", mindspeed=False, deterministic=True)
    kept = [f for f in filters if f in warnings.filters] == filters
    once = [str(f) for f in warnings.filters if f[0] == "once" and f[2] is Warning]
    try:
        torch.empty(2**50, dtype=torch.uint8, device=running.device)
    except RuntimeError as error:
        out_of_memory = running.explain(error)
    running.barrier()
    with warnings.catch_warnings(record=True) as told:
        torch.distributed.broadcast(torch.ones(1, device=running.device), 0)
        torch.distributed.barrier()
    print(json.dumps([running.simulated, running.memory(),
        running.describe(), out_of_memory, kept, once, [str(w.message) for w in told],
        os.environ["TASK_QUEUE_ENABLE"], os.environ["HCCL_DETERMINISTIC"],
        torch.are_deterministic_algorithms_enabled()]))
    running.close()
"""

ABSENT_RANK = """
    import os, time
    from qwen2_ascend import runtime
    from qwen2_ascend.errors import UserError
    from qwen2_ascend.runtime import startup
    if os.environ["RANK"] == "1":
        startup._connect_cards = lambda runtime: time.sleep(25)
    try:
        runtime.start("npu", mindspeed=False, timeout_seconds=20)
    except UserError as error:
        print(f"REFUSED {error}\\n", end="", flush=True)  # in one piece: both ranks write
"""

TOO_MANY = """
    from qwen2_ascend import runtime
    from qwen2_ascend.errors import UserError
    try:
        runtime.start("npu", mindspeed=False, timeout_seconds=20)
    except UserError as error:
        print(f"REFUSED {error}\\n", end="", flush=True)  # in one piece: both ranks write
"""


pytestmark = pytest.mark.timeout(900)


def simulated(**options: int) -> dict[str, str]:
    try:
        return environment(**options)
    except Unavailable as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"no simulated device: {error}")


def run(
    script: str, folder: Path, environ: dict[str, str], torchrun: str | None = None
) -> subprocess.CompletedProcess[str]:
    path = folder / "script.py"
    path.write_text(textwrap.dedent(script), encoding="utf-8")
    return subprocess.run(
        command([str(path)], torchrun=torchrun),
        env=environ,
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_one_card(tmp_path: Path) -> None:
    done = run(ONE_CARD, tmp_path, simulated(num_devices=1))
    assert done.returncode == 0, done.stderr
    (is_simulated, memory, line, out_of_memory, kept, once, told, queue, hccl, strict) = json.loads(
        done.stdout.splitlines()[-1]
    )
    assert is_simulated and memory is None, "no figure of hardware that is not there"
    assert line.startswith("device npu (simulated Ascend910B2), backend hccl, 1 process(es)")
    assert out_of_memory.startswith("out of memory: ") and "--micro-batch-size" in out_of_memory
    assert not told, "torch_npu's words on what no user can act on"
    assert kept and not once, "transfer_to_npu's filter would bring foreign warnings back"
    assert (queue, hccl, strict) == ("0", "true", True), "what the simulation sets stays"


def test_a_rank_that_does_not_come_is_told_with_what_to_do(tmp_path: Path) -> None:
    environ = simulated(num_devices=2, hccl_timeout_seconds=8)
    done = run(ABSENT_RANK, tmp_path, environ, "--standalone --nproc-per-node 2")
    (told,) = [line for line in done.stdout.splitlines() if line.startswith("REFUSED")]
    assert "the ranks cannot be joined: " in told and "; way out: " in told


def test_more_processes_than_cards_end_before_any_waits(tmp_path: Path) -> None:
    environ = simulated(num_devices=1)
    done = run(TOO_MANY, tmp_path, environ, "--standalone --nproc-per-node 2")
    told = [line for line in done.stdout.splitlines() if line.startswith("REFUSED")]
    assert len(told) == 2, done.stderr
    assert all("2 processes on this machine and 1 npu device(s)" in line for line in told)


def test_two_deterministic_runs_end_with_the_same_bits(tmp_path: Path) -> None:
    make_tiny_hugging_face_folder(tmp_path / "hf")
    start = ["-m", "npusim.run_inside", str(LAUNCH), "--device", "npu"]
    environ = simulated(num_devices=1)
    first, second = (trained(start, tmp_path / name, environ) for name in ("first", "second"))
    assert len(first[0]) == 3 and first[0][0] != first[0][2]
    assert first == second
