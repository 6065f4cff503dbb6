"""The sides of `qwen2-ascend benchmark` on a simulated card: right there, and never timed there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from helpers import make_tiny_hugging_face_folder
from npusim.launches import FUSED_OPERATORS
from qwen2_ascend.errors import UserError

# Foreign warnings are errors in the CPU's tests, and torch_npu adds many of its own.
pytestmark = pytest.mark.filterwarnings("default")

BENCHMARK = "benchmark"
SIDES = {
    "ours": "benchmark of ours",
    "ours-plain": "benchmark of ours-plain",
    "megatron-core": "benchmark of megatron-core",
    "transformers": BENCHMARK,
}
"""The sides, and the processes that run them: megatron-core can be set up once in each."""
STEPS = 2


def work_of(folder: Path, **changes: Any) -> Any:
    from qwen2_ascend.benchmark.work import Work

    make_tiny_hugging_face_folder(folder)
    sizes: dict[str, Any] = {"seq_length": 16, "micro_batch_size": 2, "global_batch_size": 4}
    defaults = {"side": "ours", "device": "npu", "dtype": "fp32", **sizes, "max_steps": STEPS}
    return Work(folder=str(folder), **{**defaults, **changes})


@pytest.fixture
def measured_nevertheless(monkeypatch: pytest.MonkeyPatch) -> None:
    import qwen2_ascend.benchmark.train_side  # noqa: F401 - it keeps the function that it finds

    monkeypatch.setattr("qwen2_ascend.benchmark.device.refuse_simulated", lambda runtime: None)


@pytest.mark.parametrize(
    "side",
    [pytest.param(side, marks=pytest.mark.simulated(alone=group)) for side, group in SIDES.items()],
)
def test_every_side_trains_there_as_transformers_does_on_the_cpu(
    side: str, tmp_path: Path, measured_nevertheless: None
) -> None:
    from npusim.simulator import recording
    from qwen2_ascend.benchmark.train_side import trainer_of

    work = work_of(tmp_path / "hf", side=side)
    reference = trainer_of(replace(work, side="transformers", device="cpu"))
    expected = [reference.step() for _ in range(STEPS)]
    with recording() as record:
        trainer = trainer_of(work)
        losses = [trainer.step() for _ in range(STEPS)]
    assert trainer.runtime.name == "npu" and trainer.runtime.simulated
    assert losses == pytest.approx(expected, rel=1e-6)
    assert losses[0] != losses[1]
    found = FUSED_OPERATORS & set(record.ops)
    if side == "ours":
        assert found == FUSED_OPERATORS
    elif side == "ours-plain":
        assert not found


@pytest.mark.simulated(alone=BENCHMARK)
def test_every_attention_computes_the_same_there(measured_nevertheless: None) -> None:
    from qwen2_ascend.benchmark.attention_side import prepare

    question = {
        "dtype": "fp32",
        "query_shape": [32, 1, 4, 8],
        "key_shape": [32, 1, 2, 8],
        "steps": 1,
    }
    sums = [prepare(side, "npu")(question)["sums"] for side in ("ours", "unfused", "sdpa")]
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)
    assert sums[2] == pytest.approx(sums[1], rel=1e-5)


@pytest.mark.simulated(alone=BENCHMARK)
def test_what_is_played_is_not_measured(tmp_path: Path) -> None:
    from qwen2_ascend.benchmark import attention_side, train_side

    work = json.dumps(asdict(work_of(tmp_path / "hf")))
    refused: list[Callable[[], Any]] = [
        lambda: train_side.prepare(work),
        lambda: attention_side.prepare("ours", "npu"),
    ]
    for start in refused:
        with pytest.raises(UserError, match="simulated; its speed"):
            start()
