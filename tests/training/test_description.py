"""run.json: what it says of the environment, and that it keeps secrets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.finetuning import settings as finetuning
from qwen2_ascend.training.description import _planned as planned
from qwen2_ascend.training.description import environment


def runtime(name: str = "npu", device: str = "Ascend910B2", world_size: int = 8) -> Any:
    return SimpleNamespace(name=name, world_size=world_size, device_name=lambda: device)


def test_the_environment_has_what_the_libraries_of_a_run_read_and_no_secret() -> None:
    variables = {
        "HCCL_CONNECT_TIMEOUT": "1800",
        "OMP_NUM_THREADS": "4",
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
        "HCCL_AUTH_TOKEN": "secret",
        "TORCH_API_KEY": "secret",
        "NPU_PASSWORD": "secret",
        "HF_TOKEN": "secret",
        "HOME": "/home/somebody",
        "OMPLETELY_ELSE": "x",
    }
    found = environment(runtime(), variables)
    assert found["device"] == "npu (Ascend910B2)" and found["processes"] == "8"
    assert found["torch"] and found["megatron-core"] and found["python"]
    assert {name for name in found if name in variables} == {
        "HCCL_CONNECT_TIMEOUT",
        "OMP_NUM_THREADS",
        "PYTORCH_NPU_ALLOC_CONF",
    }
    assert "secret" not in found.values()


def settings(*more: str) -> Any:
    words = ["--load", "x", "--data-path", "x.jsonl", "--seq-length", "4096", "--lr", "1e-5"]
    words += ["--num-train-epochs", "1", "--global-batch-size", "16", "--bf16"]
    return finetuning.parse([*words, "--tensor-model-parallel-size", "8", *more])


@pytest.mark.parametrize(
    ("said", "name"), [("Ascend910B2", "910B2"), ("NVIDIA A100-SXM4-40GB", "A100-40GB")]
)
def test_the_planned_memory_is_the_planners(said: str, name: str) -> None:
    from qwen2_ascend.planning.devices import find_device
    from qwen2_ascend.planning.memory import fullest_stage
    from qwen2_ascend.training.planned import as_run_layout

    config = Qwen2Config.named("0.5B")
    plan: Any = SimpleNamespace(
        settings=settings("--tensor-model-parallel-size", "2"), config=config
    )
    device = find_device(name)
    found = planned(plan, runtime(device.backend, said, world_size=2))
    _, memory = fullest_stage(as_run_layout(plan.settings, config, 2, device.backend))
    assert found == {"planned_memory_bytes": memory.total, "peak_flops": device.peak_flops}


def test_what_the_planner_does_not_know_is_not_told() -> None:
    plan: Any = SimpleNamespace(
        settings=settings("--lora-r", "2", "--lora-load", "x"), config=Qwen2Config.named("7B")
    )
    assert planned(plan, runtime()) == {}
    plan.settings = settings()
    assert planned(plan, runtime(device="another")) == {}
    assert "peak_flops" not in planned(plan, runtime("cpu", "cpu"))
