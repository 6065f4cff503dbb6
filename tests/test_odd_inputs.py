"""Whatever a launcher is given to read, it succeeds or ends with 2 and a sentence.

The last line that a user sees is never the name of a Python exception.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import odd_inputs
from commands import run_commands
from data.corpora import write_indexed
from inference.worlds import model_with_tokenizer

EXCEPTION = re.compile(r"Traceback|\b[A-Z]\w*(?:Error|Exception|Iteration|Interrupt)\b")
SIZES = "--seq-length 64 --train-iters 1 --global-batch-size 1 --lr 1e-3 --eval-iters 0"
NEW = "--max-new-tokens 1"


PARTS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("odd")


@pytest.fixture(scope="module")
def commands(folder: Path) -> dict[str, dict[str, Any]]:
    """Each launcher with each odd file that it reads, by what is odd."""
    good = model_with_tokenizer(folder / "hf")
    made: dict[str, dict[str, Any]] = {}

    def add(what: str, program: str, line: str) -> None:
        made[f"{program}: {what} ({len(made)})"] = {"program": program, "flags": line.split()}

    write_indexed(folder / "corpus", [40] * 8)
    (folder / "chats.jsonl").write_text(f"{json.dumps({'messages': odd_inputs.MESSAGES})}\n" * 4)
    for kind in ("rows", "indexes", "models", "tokenizers", "adapters"):
        (folder / kind).mkdir()

    def preprocess(what: str, path: Path, flags: str) -> None:
        out = f"--output-prefix {folder}/out/{len(made)} --workers 1"
        add(what, "qwen2-ascend", f"preprocess --input {path} {out} {flags}")

    model, tokenizer = f"--load {good}", f"--tokenizer-model {good}"
    for what, path in odd_inputs.rows(folder / "rows", "text").items():
        preprocess(what, path, tokenizer)
        add(what, "evaluate", f"{model} --text-file {path} --window 64")
    for what, path in odd_inputs.rows(folder / "rows", "prompt").items():
        add(what, "generate", f"{model} --prompt-file {path} {NEW}")
    data = odd_inputs.rows(folder / "rows", "messages") | odd_inputs.chats(folder / "rows")
    for what, path in data.items():
        preprocess(f"{what}, chats", path, f"{tokenizer} --task sft")
        add(what, "finetune", f"{model} --data-path {path} {SIZES}")
        add(what, "generate", f"{model} --prompt-file {path} {NEW}")
    for what, path in odd_inputs.indexes(folder / "indexes").items():
        add(what, "pretrain", f"{model} --data-path {path} {SIZES} --split 1,0,0")
    for what, path in odd_inputs.models(folder / "models", good).items():
        convert = f"convert --load-dir {path} --save-model-type mg --save-dir"
        add(what, "qwen2-ascend", f"{convert} {folder}/out/{len(made)}")
        add(what, "generate", f"--load {path} --prompt a {NEW}")
        if what.startswith("config"):
            corpus = f"--data-path {folder}/corpus --split 1,0,0"
            add(what, "pretrain", f"--load {path} {corpus} {SIZES}")
    for what, path in odd_inputs.tokenizers(folder / "tokenizers", good).items():
        prompt = f"--load {path} --prompt a --apply-chat-template {NEW}"
        add(what, "generate", prompt)
        add(what, "finetune", f"--load {path} --data-path {folder}/chats.jsonl {SIZES}")
        preprocess(what, folder / "chats.jsonl", f"--tokenizer-model {path} --task sft")
    for what, path in odd_inputs.adapters(folder / "adapters").items():
        add(what, "generate", f"{model} --adapter {path} --prompt a {NEW}")
    return made


@pytest.mark.parametrize("part", range(PARTS))
def test_odd_inputs_are_taken_or_refused_in_a_sentence(
    part: int, folder: Path, commands: dict[str, dict[str, Any]]
) -> None:
    names = list(commands)[part::PARTS]
    wrong = {}
    ended = run_commands(folder, {name: commands[name] for name in names})
    for name, (status, out, err, _) in ended.items():
        told = [line for line in err.splitlines() if line.startswith("error: ")]
        sentences = all(len(line.split()) > 4 for line in told)
        if (status not in (0, 2) or EXCEPTION.search(out + err) or not sentences) or (
            status == 2 and not told
        ):
            wrong[name] = f"{status}: {err[-700:]}"
    assert not wrong, "\n\n".join(f"{name}: {how}" for name, how in wrong.items())
