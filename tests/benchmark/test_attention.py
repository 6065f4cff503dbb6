"""`qwen2-ascend benchmark attention`: its arithmetic, its refusals, and a run of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen2_ascend.benchmark import attention
from qwen2_ascend.errors import UserError


def answer(wall: float, sums: list[float]) -> dict:
    return {
        "wall": wall,
        "cpu": 2 * wall,
        "sums": sums,
        "peak_memory_bytes": 10**6,
        "device": "cpu",
    }


def test_figures_follow_from_the_seconds() -> None:
    options = attention.AttentionBenchmark(sides=("ours", "sdpa"), steps=3)
    answers = {
        "ours": [answer(2.0, [1.0, 2.0]), answer(4.0, [1.0, 2.0])],
        "sdpa": [answer(3.0, [1.0, 2.00001]), answer(2.0, [1.0, 2.0])],
    }
    report = attention.summarize(options, "fp32", 8, answers)
    pairs = 8 * 9 / 2  # of 8 tokens each sees itself and those before it
    flops = 3 * 3 * (4 * pairs * 14 * 64)
    assert report["sides"]["ours"]["tflops_per_second"] == pytest.approx(
        [flops / 2e12, flops / 4e12]
    )
    assert report["sides"]["sdpa"]["first_over_it"] == [1.5, 0.5]
    assert report["same_results"] and report["largest_difference"] == pytest.approx(5e-6)
    answers["sdpa"][1]["sums"] = [1.0, float("nan")]
    assert not attention.summarize(options, "fp32", 8, answers)["same_results"]


@pytest.mark.timeout(900)
def test_every_side_computes_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attention.run(
        attention.AttentionBenchmark(
            seq_lengths=(24,),
            batch_size=2,
            num_attention_heads=4,
            num_query_groups=2,
            kv_channels=16,
            device="cpu",
            steps=1,
            rounds=1,
            json=tmp_path / "out.json",
        )
    )
    reports = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [report["dtype"] for report in reports] == ["fp32", "bf16"]
    for report in reports:
        assert report["same_results"] and set(report["sides"]) == set(attention.SIDES)
    assert "| fp32 | 24 | unfused |" in capsys.readouterr().out


def test_all_that_is_wrong_is_told_at_once() -> None:
    wrong = attention.AttentionBenchmark(
        dtypes=("fp8",), sides=("flash",), num_attention_heads=3, seq_lengths=(0,)
    )
    with pytest.raises(UserError) as refused:
        attention.run(wrong)
    for words in ("--dtypes fp8", "--sides flash", "--num-attention-heads 3", "--seq-lengths 0"):
        assert words in str(refused.value)
