"""The whole job with real weights: split, logits, training, merge, generation.

Needs a Hugging Face folder of a 0.5B Qwen2.5 in QWEN2_REAL_CHECKPOINT, 16 GB of memory and about
half an hour on two cores: `make test-real`.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from distributed.harness import Check, launch
from real.real_worker import CHECKS

REPOSITORY = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("real_worker.py")
SEQ_LENGTH, TRAIN_ITERS = 256, 10
PROMPT = "def fibonacci(n):\n"

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        not os.environ.get("QWEN2_REAL_CHECKPOINT"),
        reason="QWEN2_REAL_CHECKPOINT names no Hugging Face folder",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as `hf`, cut as `tp2pp2` and `pp4`, with tokens and transformers' logits."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "hf").symlink_to(Path(os.environ["QWEN2_REAL_CHECKPOINT"]).resolve())
    convert(folder / "hf", folder / "tp2pp2", "mg", "--target-tensor-parallel-size", "2",
            "--target-pipeline-parallel-size", "2")  # fmt: skip
    convert(folder / "hf", folder / "pp4", "mg", "--target-pipeline-parallel-size", "4",
            "--save-format", "safetensors")  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def logits(folder: Path):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
    tokens = torch.tensor([token_ids(folder / "hf", stdlib("textwrap"))[:96]])
    with torch.no_grad():
        np.save(folder / "logits.npy", model(tokens).logits.numpy())
    np.save(folder / "tokens.npy", tokens.numpy())
    del model
    os.environ["QWEN2_REAL_FOLDER"] = str(folder)
    return launch(WORKER, 4, folder / "launch", timeout=1800)


@pytest.mark.parametrize("check", CHECKS.all(), ids=str)
def test_logits_equal_transformers(check: Check, logits) -> None:
    assert check.name in logits, logits["launch"].detail
    logits[check.name].require()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_merging_and_generating(folder: Path, dtype: str) -> None:
    texts = [stdlib(name) for name in ("textwrap", "heapq", "bisect", "fnmatch")]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "corpus.jsonl").write_text(rows, encoding="utf-8")
    run(
        "preprocess", "--input", folder / "corpus.jsonl", "--output-prefix", folder / "corpus",
        "--tokenizer-name-or-path", folder / "hf", "--append-eod", "--workers", "1", "--overwrite",
    )  # fmt: skip
    trained = folder / f"trained-{dtype}"
    train(folder, trained, [] if dtype == "fp32" else ["--bf16"])

    lines = (trained / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    print("losses", losses)
    assert len(losses) == TRAIN_ITERS
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.05, losses

    merged = folder / f"merged-{dtype}"
    convert(trained, merged, "hf", "--verify")
    before, _ = loss_and_text(folder / "hf", texts[0])
    after, text = loss_and_text(merged, texts[0])
    print(
        f"{dtype}: transformers' loss on a text trained on: {before:.3f} before, {after:.3f} after"
    )
    print(PROMPT + text)
    assert after < before
    assert is_sensible_code(PROMPT + text), text


def train(folder: Path, save: Path, options: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "4", REPOSITORY / "launch" / "pretrain_qwen2.py"]
    command += ["--load", folder / "hf", "--save", save, "--data-path"]
    command += [folder / "corpus_text_document", "--split", "100,0,0"]
    command += ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    command += ["--micro-batch-size", "1", "--global-batch-size", "4", "--no-save-optim"]
    command += ["--seq-length", SEQ_LENGTH, "--train-iters", TRAIN_ITERS, "--lr", "2e-5"]
    command += ["--lr-decay-style", "constant", "--lr-warmup-iters", "2", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*map(str, command)], env=environment, timeout=3000, check=True)


def convert(source: Path, target: Path, kind: str, *options: str) -> None:
    run("convert", "--save-model-type", kind, "--load-dir", source, "--save-dir", target, *options)


def run(*words: object) -> None:
    command = [sys.executable, "-m", "qwen2_ascend.cli", *map(str, words)]
    subprocess.run(command, timeout=1200, check=True)


def loss_and_text(model_folder: Path, text: str) -> tuple[float, str]:
    """Loss on `text` in nats per token, and the greedy continuation of PROMPT, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    tokens = torch.tensor([token_ids(model_folder, text)[: 4 * SEQ_LENGTH]])
    prompt = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss.item()
        output = model.generate(**prompt, max_new_tokens=128, do_sample=False)
    new = output[0, prompt.input_ids.shape[1] :]
    return loss, tokenizer.decode(new, skip_special_tokens=True)


def token_ids(model_folder: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder)(text).input_ids


def stdlib(module: str) -> str:
    return (Path(sysconfig.get_path("stdlib")) / f"{module}.py").read_text(encoding="utf-8")


def is_sensible_code(text: str) -> bool:
    """Whether the longest prefix of whole lines that parses is a function with a return."""
    lines = text.splitlines()
    for end in range(len(lines), 0, -1):
        try:
            tree = ast.parse("\n".join(lines[:end]))
        except SyntaxError:
            continue
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        return any(isinstance(n, ast.Return) for f in functions for n in ast.walk(f))
    return False
