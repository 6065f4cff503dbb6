"""`qwen2-ascend benchmark train`: the arithmetic of its report, its refusals, and a run of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from commands import run_python
from helpers import tiny_config
from qwen2_ascend.benchmark import train
from qwen2_ascend.benchmark.measure import largest_difference, spread
from qwen2_ascend.benchmark.sides import interleaved
from qwen2_ascend.errors import UserError
from qwen2_ascend.planning.flops import train_flops_per_token

TINY = tiny_config(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=96,
    max_position_embeddings=64,
)
OPTIONS = train.TrainBenchmark(
    sides=("ours", "transformers"),
    device="cpu",
    seq_length=16,
    micro_batch_size=3,
    steps=2,
    rounds=2,
)


def answer(wall: float, cpu: float, losses: list[float], memory: int = 10**6) -> dict:
    return {
        "wall": wall,
        "cpu": cpu,
        "losses": losses,
        "peak_memory_bytes": memory,
        "device": "cpu",
    }


def test_figures_follow_from_the_seconds() -> None:
    answers = {
        "ours": [answer(2.0, 1.0, [4.0, 3.0]), answer(4.0, 3.0, [2.0, 1.0], 3 * 10**6)],
        "transformers": [answer(3.0, 1.0, [4.0, 3.0]), answer(2.0, 1.5, [2.0, 1.00000001])],
    }
    report = train.summarize(OPTIONS, TINY, "fp32", answers)
    ours, rival = report["sides"]["ours"], report["sides"]["transformers"]
    tokens = 2 * 3 * 16
    assert ours["tokens_per_second"] == [tokens / 2, tokens / 4]
    flops = tokens * train_flops_per_token(TINY, 16, TINY.vocab_size)
    assert ours["tflops_per_second"] == pytest.approx([flops / 2e12, flops / 4e12])
    assert ours["mfu"] is None, "a cpu's peak is not known"
    assert ours["peak_memory_bytes"] == 3 * 10**6
    assert rival["first_over_it"] == [3.0 / 2.0, 2.0 / 4.0]
    assert ours["first_over_it"] == [1.0, 1.0]
    assert report["same_losses"] and 0 < report["largest_loss_difference"] < 2e-8
    by_cpu = train.summarize(replace(OPTIONS, clock="cpu"), TINY, "fp32", answers)
    assert by_cpu["sides"]["transformers"]["first_over_it"] == [1.0, 0.5]
    known = train.summarize(replace(OPTIONS, peak_tflops=2.0), TINY, "fp32", answers)
    assert known["sides"]["ours"]["mfu"] == pytest.approx([flops / 2 / 2e12, flops / 4 / 2e12])


def test_other_losses_are_other_work() -> None:
    for loss in (1.001, float("nan")):
        answers = {"ours": [answer(1, 1, [1.0])], "transformers": [answer(1, 1, [loss])]}
        assert not train.summarize(OPTIONS, TINY, "fp32", answers)["same_losses"]
    assert largest_difference([[2.0, 4.0], [2.0, 3.0], [2.1, 4.0]]) == pytest.approx(0.25)


def test_sides_take_turns_at_being_first() -> None:
    asked: list[str] = []

    def measure(side: str) -> int:
        asked.append(side)
        return len(asked)

    results = interleaved("abc", 2, measure)
    assert "".join(asked) == "abc" + "bca" + "cab"
    assert results == {"a": [6, 8], "b": [4, 9], "c": [5, 7]}, "the first round does not count"


def test_a_spread_is_written_as_its_format_says() -> None:
    assert spread([3.0, 1.0, 2.0], ".1f") == "2.0 (1.0-3.0)"
    assert spread([1.0]) == "1.00 (1.00-1.00)"


def test_all_that_is_wrong_is_told_at_once() -> None:
    wrong = train.TrainBenchmark(
        sides=("ours", "theirs"),
        dtypes=("int8",),
        micro_batch_size=2,
        global_batch_size=3,
        rounds=0,
        load=Path("nowhere"),
        config="0.5B",
        peak_tflops=0,
    )
    with pytest.raises(UserError) as refused:
        train.run(wrong)
    told = str(refused.value)
    for words in (
        "--sides theirs",
        "--dtypes int8",
        "--global-batch-size 3",
        "--rounds 0",
        "leave --config",
        "no Hugging Face folder",
        "--peak-tflops 0",
    ):
        assert words in told


@pytest.mark.timeout(900)
def test_every_side_trains_alike(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_hugging_face()), encoding="utf-8")
    command = ["-m", "qwen2_ascend.cli", "benchmark", "train"]
    command += ["--config", str(tmp_path / "config.json"), "--device", "cpu", "--rounds", "1"]
    command += ["--seq-length", "16", "--micro-batch-size", "2", "--global-batch-size", "4"]
    command += ["--sides", "ours", "ours-plain", "transformers", "megatron-core"]
    told = run_python(*command, "--json", tmp_path / "out.json").out
    (report,) = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    losses = {side: row["losses"] for side, row in report["sides"].items()}
    assert {side: len(found) for side, found in losses.items()} == {
        "ours": 2,
        "ours-plain": 2,
        "transformers": 2,
        "megatron-core": 2,
    }
    assert report["same_losses"] and losses["ours"][1] < losses["ours"][0]
    assert "| transformers |" in told and "losses: the same" in told
