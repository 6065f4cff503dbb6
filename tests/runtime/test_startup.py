"""start(): as a single plain process, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

from qwen2_ascend.errors import UserError
from qwen2_ascend.runtime import start

PLAIN_PROCESS = """
    import json, torch
    from qwen2_ascend import runtime

    running = runtime.start("cpu", timeout_seconds=30)
    patches = [patch.target for patch in runtime.applied_patches()]
    assert runtime.start() is running is runtime.current()
    assert len(patches) == len(set(patches)) == len(runtime.applied_patches())
    assert all(p.why and p.how and p.until for p in runtime.applied_patches())
    total = torch.ones(2)
    torch.distributed.all_reduce(total)

    held = torch.ones(100_000_000, dtype=torch.uint8)
    peak = running.peak_memory_bytes()
    del held
    running.reset_peak_memory()
    after = running.peak_memory_bytes()

    draws = []
    for _ in range(2):
        running.seed_all(5)
        draws.append(torch.rand(3).tolist())
    running.synchronize()
    running.barrier()
    line = running.describe()
    assert running.memory() is running.utilization_percent() is None
    assert running.explain(RuntimeError("EI0006")) is None
    assert not torch.are_deterministic_algorithms_enabled()
    running.close()
    assert not torch.distributed.is_initialized()
    again = runtime.start("cpu", deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    again.close()
    print(json.dumps([running.rank, running.world_size, running.backend, line, patches,
                      total.tolist(), peak, after, draws]))
"""


@pytest.fixture(scope="module")
def plain() -> list:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(PLAIN_PROCESS)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_plain_process_is_rank_0_of_1(plain: list) -> None:
    rank, world_size, backend, line, patches, total, *_ = plain
    assert (rank, world_size, backend, total) == (0, 1, "gloo", [1.0, 1.0])
    assert line.startswith("device cpu, backend gloo, 1 process(es), torch ")
    assert "megatron-core 0." in line
    assert "torch:cuda.current_device" in patches


def test_peak_memory_sees_a_peak_and_forgets_it(plain: list) -> None:
    peak, after = plain[6:8]
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this kernel does not reset the peak")
    assert peak - after > 80_000_000


def test_seeds_repeat_the_draws(plain: list) -> None:
    first, second = plain[8]
    assert first == second


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE=2 is set but RANK, LOCAL_RANK is not"):
        start("cpu")
