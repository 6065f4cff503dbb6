"""start(): as a single plain process, and what it refuses."""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path

import pytest
import torch

from commands import run_python
from qwen2_ascend.errors import UserError
from qwen2_ascend.runtime import environment, start

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

    from megatron.core import tensor_parallel
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32
    tracker = tensor_parallel.get_cuda_rng_tracker()
    tracker.add("dropout", 5)
    with tracker.fork("dropout"):
        torch.rand(1)
    gradients = torch.rand(1 << 24).split([5, 1 << 23, (1 << 23) - 5])
    norm, exact = get_grad_norm_fp32(gradients), torch.cat(gradients).double().norm().item()

    assert running.memory() is None
    assert running.explain(RuntimeError("EI0006")) is None
    assert not torch.are_deterministic_algorithms_enabled()
    running.close()
    assert not torch.distributed.is_initialized()
    again = runtime.start("cpu", deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    again.close()
    print(json.dumps([running.rank, running.world_size, running.backend, line, patches,
                      total.tolist(), peak, after, draws, norm / exact - 1]))
"""


@pytest.fixture(scope="module")
def plain() -> list:
    words = ("-W", "error::UserWarning", "-c", textwrap.dedent(PLAIN_PROCESS))
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = run_python(*words, environ=environ)
    assert "RNG" not in done.err, "megatron-core warns of each dropout"
    return json.loads(done.out)


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


def test_the_norm_of_large_gradients_is_exact(plain: list) -> None:
    """torch.norm gives 2e-4 less for these 16 million numbers: clipping would depend on the cut."""
    assert abs(plain[9]) < 1e-6


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE=2 is set but RANK, LOCAL_RANK is not"):
        start("cpu")


TORCH_NPU = """
import json, os, sys
names = sys.argv[1:]
print(json.dumps({name: os.environ.get(name) for name in names}))
raise ImportError("libascendcl.so: cannot open shared object file: No such file or directory")
"""
STARTED = """
from qwen2_ascend import runtime
from qwen2_ascend.errors import UserError
try:
    running = runtime.start({device!r}, deterministic=True, timeout_seconds=300)
    print(*running.notes, sep="\\n")
    running.close()
except UserError as error:
    print(error)
"""


@pytest.fixture
def broken_torch_npu(tmp_path: Path):
    """Runs `start` where torch_npu tells what it finds in the environment, and then fails."""
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu" / "__init__.py").write_text(TORCH_NPU)
    info = tmp_path / "torch_npu-0.0.0.dist-info"
    info.mkdir()
    release = torch.__version__.split("+")[0]
    text = f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {release}\n"
    (info / "METADATA").write_text(text)

    def started(device: str | None, *names: str) -> list[str]:
        left_out = ("RANK", "WORLD_SIZE", "ASCEND_HOME_PATH", *names)
        kept = {k: v for k, v in os.environ.items() if k not in left_out}
        environ = {**kept, "PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)}
        words = ("-c", STARTED.format(device=device), *names)
        return run_python(*words, environ=environ).out.splitlines()

    return started


def test_the_environment_is_complete_before_torch_npu_is_imported(broken_torch_npu) -> None:
    """HCCL and CANN read these when they come up; later is too late."""
    variables = environment.wanted(300, deterministic=True)
    found, told = broken_torch_npu("npu", *(variable.name for variable in variables))
    assert json.loads(found) == {variable.name: variable.value for variable in variables}
    assert told.startswith("device=npu cannot be used: libascendcl.so is not found: CANN is not")


def test_the_cpu_is_not_taken_silently(broken_torch_npu) -> None:
    lines = broken_torch_npu(None)
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "no NPU is used, this runs on the cpu: libascendcl.so is not found" in warnings[0]
