"""Greedy tokens of real weights are transformers', at TP1 and TP2, as the launcher is run.

Needs a Hugging Face folder of a 0.5B Qwen2.5 in QWEN2_REAL_CHECKPOINT, 8 GB of memory and some ten
minutes on two cores: `make test-real`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch" / "generate_qwen2.py"
NEW_TOKENS = 64
ROWS = [
    {"prompt": "def fibonacci(n):\n"},
    {"prompt": "# Sorts a list in place with quicksort.\n"},
    {"messages": [{"role": "user", "content": "What is the capital of France? 请用中文回答。"}]},
    {"prompt": "Once upon a time, in a land far away, there lived a"},
    {"prompt": "import torch\n\n\nclass RMSNorm(torch.nn.Module):\n    def __init__(self):\n"},
]

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        not os.environ.get("QWEN2_REAL_CHECKPOINT"),
        reason="QWEN2_REAL_CHECKPOINT names no Hugging Face folder",
    ),
]


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """Each prompt alone, without padding, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = os.environ["QWEN2_REAL_CHECKPOINT"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = []
    for row in ROWS:
        text = row.get("prompt") or tokenizer.apply_chat_template(
            row["messages"], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, return_tensors="pt").input_ids
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
        )
        texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("tp", [1, 2])
def test_greedy_texts_are_transformers(tp: int, expected: list[str], tmp_path: Path) -> None:
    """Four rows for five prompts of different lengths: one row is used again."""
    rows = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(tp), str(LAUNCH), "--fp32", "--greedy"]
    command += ["--load", os.environ["QWEN2_REAL_CHECKPOINT"], "--batch-size", "4"]
    command += ["--prompt-file", str(tmp_path / "rows.jsonl"), "--device", "cpu"]
    command += ["--output-file", str(tmp_path / "out.jsonl")]
    command += ["--max-new-tokens", str(NEW_TOKENS), "--tensor-model-parallel-size", str(tp)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, timeout=1800, check=True)
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    assert [row["response"] for row in found] == expected
    assert max(row["num_new_tokens"] for row in found) == NEW_TOKENS
