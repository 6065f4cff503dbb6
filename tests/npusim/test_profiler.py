"""torch_npu's profiler is called as it wants to be; recording itself needs CANN's libraries."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.simulated(alone="profiler")
def test_a_run_is_refused_where_cann_has_no_profiler(tmp_path: Path) -> None:
    """It has made no step; torch_npu would print an error and go on without a trace."""
    from types import SimpleNamespace

    from qwen2_ascend.errors import UserError
    from qwen2_ascend.telemetry.instruments import Instruments
    from qwen2_ascend.training.settings import parse

    flags = "--config 0.5B --mock-data --seq-length 8 --lr 1e-5 --train-iters 20 --no-log-energy "
    run = SimpleNamespace(
        settings=parse(f"{flags} --profile-steps 10:12 --profile-dir {tmp_path}/traces".split()),
        runtime=SimpleNamespace(name="npu", rank=1),
        progress=SimpleNamespace(iteration=0),
        train_iters=20,
    )
    with pytest.raises(UserError, match=r"CANN's libmsprofiler\.so, which is not found"):
        Instruments(run, 8)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.simulated(alone="profiler")
@pytest.mark.parametrize("level", ["level_none", "level0", "level1", "level2"])
def test_torch_npu_takes_every_option(
    level: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its calls swallow exceptions and print them: what is printed is CANN's absence alone."""
    import torch

    from qwen2_ascend.runtime.profiling import open_profiler

    profiler = open_profiler(
        "npu",
        tmp_path,
        "rank0",
        warmup=1,
        active=1,
        record_shapes=True,
        profile_memory=True,
        with_stack=True,
        level=level,
    )
    profiler.start()
    for _ in range(2):
        torch.ones(4, device="npu") + 1
        profiler.step()
    profiler.stop()
    said = "".join(capfd.readouterr())
    assert "Failed to find function aclprofInit" in said, "start was reached, and reached CANN"
    assert "aic metrics" not in said and "invalid" not in said.lower(), said
    assert len(list(tmp_path.glob("rank0_*_ascend_pt"))) == 1
