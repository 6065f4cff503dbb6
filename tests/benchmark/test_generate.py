"""`qwen2-ascend benchmark generate` runs both sides and compares their tokens."""

from __future__ import annotations

import json
from pathlib import Path

from commands import run_python
from inference.worlds import model_with_tokenizer


def test_both_sides_are_run(tmp_path: Path) -> None:
    model_with_tokenizer(tmp_path / "hf")
    # the sides differ in what they read of it: ours is told to be greedy, without a penalty
    (tmp_path / "hf" / "generation_config.json").unlink()
    command = ["-m", "qwen2_ascend.cli", "benchmark", "generate"]
    command += ["--load", str(tmp_path / "hf"), "--dtypes", "fp32", "--batch-sizes", "1"]
    command += ["--new-tokens", "4", "--rounds", "2", "--json", str(tmp_path / "out.json")]
    told = run_python(*command).out
    (row,) = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert row["same_tokens"] is True
    assert {name: len(values) for name, values in row["seconds"].items()} == {
        "ours": 2,
        "transformers": 2,
    }
    assert "| fp32 | 1 |" in told and "| yes |" in told


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    command = ["-m", "qwen2_ascend.cli", "benchmark", "generate"]
    command += ["--load", str(tmp_path), "--dtypes", "int8", "--rounds", "0"]
    ended = run_python(*command, status=2)
    for words in ("--dtypes int8", "--rounds 0", "is no Hugging Face folder"):
        assert words in ended.err
