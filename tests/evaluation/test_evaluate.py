"""launch/evaluate_qwen2.py as a user runs it: a text file, a task of one's own, mistakes."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

from inference.worlds import Ended, model_with_tokenizer, run_commands

TEXT = "the of and to in 日本 語 a is that ( ) def return 😀 was for as with\n" * 12
QUESTIONS = [
    {"question": "the of and", "choices": [" to in", " 日本", " def"], "answer": 1},
    {"question": "is that it", "choices": [" for as", " was"], "answer": 0},
    {"question": "return", "choices": [" ( )", " naïve über", " he be a is"], "answer": 2},
]
CHOICE_TASK = """
task: own_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
GENERATE_TASK = """
task: own_generate
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs:
  until: ["zzz"]
  max_gen_toks: 8
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed (the extra 'eval')"
)


class World(NamedTuple):
    folder: Path
    runs: dict[str, Ended]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("evaluate")
    model_with_tokenizer(folder / "hf")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "empty.txt").write_text("", encoding="utf-8")
    (folder / "tasks").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in QUESTIONS)
    (folder / "questions.jsonl").write_text(lines, encoding="utf-8")
    for name, task in (("choice", CHOICE_TASK), ("generate", GENERATE_TASK)):
        text = task.format(file=folder / "questions.jsonl")
        (folder / "tasks" / f"{name}.yaml").write_text(text, encoding="utf-8")
    commands = {
        name: {"program": "evaluate", "flags": flags.format(d=folder).split()}
        for name, flags in _commands().items()
    }
    return World(folder, run_commands(folder, commands))


def _commands() -> dict[str, str]:
    model = "--load {d}/hf"
    own = f"{model} --include-path {{d}}/tasks --tasks own_choice"
    commands = {
        "text": f"{model} --text-file {{d}}/text.txt --window 64 --stride 24 "
        "--output-json {d}/text.json",
        "whole": f"{model} --text-file {{d}}/text.txt --output-json {{d}}/whole.json",
        "nothing": model,
        "bad values": f"{model} --text-file {{d}}/no.txt --window 9999 --batch-size 0 --limit 0",
        "empty": f"{model} --text-file {{d}}/empty.txt",
    }
    if find_spec("lm_eval") is None:
        return commands | {"no lm-eval": own}
    return commands | {
        "tasks": f"{own} own_generate --output-json {{d}}/tasks.json",
        "unknown task": f"{own}_of_nobody",
    }


def metrics(path: Path) -> dict[tuple[str, str], float]:
    rows = json.loads(path.read_text(encoding="utf-8"))["results"]
    return {(row["task"], row["metric"]): row["value"] for row in rows}


def test_perplexity_of_a_text(world: World) -> None:
    for name, window, stride in (("text", 64, 24), ("whole", 256, 128)):
        run = world.runs[name]
        assert run.status == 0, run.err
        found = metrics(world.folder / f"{name}.json")
        loss, count = expected_loss(world, window, stride)
        assert abs(found["text.txt", "loss"] - loss) <= 1e-5
        assert abs(found["text.txt", "perplexity"] / math.exp(loss) - 1) <= 1e-5
        num_bytes = len(TEXT.encode())
        assert found["text.txt", "bits_per_byte"] == pytest.approx(
            loss * count / num_bytes / math.log(2), abs=1e-5
        )
        assert f"| text.txt | loss | {loss:.4f} |  | {count} |" in run.out


def expected_loss(world: World, window: int, stride: int) -> tuple[float, int]:
    """As transformers' page on perplexity: labels of what was scored before are -100."""
    import torch
    from transformers import AutoTokenizer, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(world.folder / "hf")
    model = Qwen2ForCausalLM.from_pretrained(world.folder / "hf").float().eval()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    total, count, previous = 0.0, 0, 1
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + window, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : previous - begin] = -100
        with torch.no_grad():
            loss = model(ids[:, begin:end], labels=labels).loss.item()
        total += loss * (end - previous)
        count += end - previous
        previous = end
        if end == ids.shape[1]:
            break
    return total / count, count


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", ["give --text-file, --tasks or both"]),
        ("bad values", ["no.txt: no such file", "--window 9999", "--batch-size 0", "--limit 0"]),
        ("empty", ["has 0 token(s)"]),
    ],
)
def test_mistakes_are_named_together(world: World, name: str, words: list[str]) -> None:
    run = world.runs[name]
    assert run.status == 2, run.err
    for word in words:
        assert word in run.err
    assert "Traceback" not in run.err


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_missing_lm_eval_is_said(world: World) -> None:
    assert world.runs["no lm-eval"].status == 2
    assert "pip install 'qwen2-ascend[eval]'" in world.runs["no lm-eval"].err


@needs_lm_eval
def test_tasks_of_local_files(world: World) -> None:
    """Accuracy by choosing the likeliest continuation, as transformers' logits have it."""
    run = world.runs["tasks"]
    assert run.status == 0, run.err
    found = metrics(world.folder / "tasks.json")
    assert found["own_choice", "acc"] == pytest.approx(expected_accuracy(world))
    assert found["own_generate", "exact_match"] == 0.0
    assert "| own_choice | acc |" in run.out


def expected_accuracy(world: World) -> float:
    import torch
    from transformers import AutoTokenizer, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(world.folder / "hf")
    model = Qwen2ForCausalLM.from_pretrained(world.folder / "hf").float().eval()

    def score(question: str, choice: str) -> float:
        context = tokenizer(question).input_ids
        ids = tokenizer(question + choice).input_ids
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(logs[i - 1, ids[i]].item() for i in range(len(context), len(ids)))

    right = 0
    for row in QUESTIONS:
        scores = [score(row["question"], choice) for choice in row["choices"]]
        right += scores.index(max(scores)) == row["answer"]
    return right / len(QUESTIONS)


@needs_lm_eval
def test_an_unknown_task_is_refused(world: World) -> None:
    run = world.runs["unknown task"]
    assert run.status == 2, run.err
    assert "lm-eval has no such task" in run.err
