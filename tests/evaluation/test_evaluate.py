"""launch/evaluate_qwen2.py as a user runs it: a text file, tasks of one's own, mistakes.

At every layout the tasks' results are those of lm-eval's own `hf` model, which is transformers.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import TORCHRUN, World, commands_in, run_python
from data.chats import write_rows
from evaluation.lm_eval_runs import by_hf_model, metrics, needs_lm_eval
from inference.worlds import Theirs, model_with_tokenizer

LAUNCH = Path(__file__).parents[2] / "launch" / "evaluate_qwen2.py"
NEW_TOKENS = 8
TEXT = "the of and to in 日本 語 a is that ( ) def return 😀 was for as with\n" * 12
QUESTIONS = [
    {"question": "the of and", "choices": [" to in", " 日本", " def"], "answer": 1},
    {"question": "is that it", "choices": [" for as", " was", " with"], "answer": 0},
    {"question": "return", "choices": [" ( )", " naïve über", " he be a is"], "answer": 2},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
doc_to_text: "{{{{question}}}}"
{rest}
"""
TASKS = {
    "own_choice": """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
  - metric: brier_score
""",
    "own_generate": f"""
output_type: generate_until
doc_to_target: "{{{{continuation}}}}"
generation_kwargs:
  until: ["zzz"]
  max_gen_toks: {NEW_TOKENS}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
""",
    "own_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{long}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
}
TOKENIZERS = ("adds_bos", "knows_bos", "other_eos")
"""DeepSeek-R1-Distill-Qwen's; one with a bos token that is not added; one with its own eos."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("evaluate")
    model_with_tokenizer(folder / "hf")
    for name in TOKENIZERS:
        other_tokenizer(folder / "hf", folder / name, name)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "empty.txt").write_text("", encoding="utf-8")
    (folder / "tasks").mkdir()
    rows = [
        {**row, "continuation": continuation(folder, row["question"]), "long": 2 * TEXT}
        for row in QUESTIONS
    ]
    write_rows(folder / "questions.jsonl", rows)
    for name, rest in TASKS.items():
        text = TASK.format(name=name, file=folder / "questions.jsonl", rest=rest)
        (folder / "tasks" / f"{name}.yaml").write_text(text, encoding="utf-8")
    commands = {
        name: {"program": "evaluate", "flags": flags.format(d=folder).split()}
        for name, flags in _commands().items()
    }
    with commands_in(folder, commands) as runs:
        yield World(folder, runs)


def other_tokenizer(source: Path, folder: Path, name: str) -> None:
    """Copies the model with a tokenizer of another kind."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    shutil.copytree(source, folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if name == "other_eos":
        tokenizer.eos_token = "<|im_end|>"
        tokenizer.save_pretrained(folder)
        generation = {"eos_token_id": [0, 2], "repetition_penalty": 1.1}
        (folder / "generation_config.json").write_text(json.dumps(generation))
        return
    tokenizer.bos_token = "<|im_start|>"
    if name == "adds_bos":
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
        )
    tokenizer.save_pretrained(folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    assert (loaded("be").input_ids[0] == loaded.bos_token_id) == (name == "adds_bos")


def continuation(folder: Path, text: str) -> str:
    """transformers' greedy one, with the repetition penalty of generation_config.json."""
    theirs = Theirs(folder / "hf")
    found = theirs.text(text, NEW_TOKENS)
    plain = theirs.text(text, NEW_TOKENS, repetition_penalty=1.0)
    assert found != plain, "the penalty changes nothing; take another question"
    return found


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
    for name in TOKENIZERS:
        commands[name] = f"--load {{d}}/{name} --include-path {{d}}/tasks --tasks " + " ".join(
            TASKS
        )
        commands[name] += f" --output-json {{d}}/{name}.json"
    return commands | {
        "tasks": f"{own} own_generate own_rolling --output-json {{d}}/tasks.json",
        "unknown task": f"{own}_of_nobody",
    }


def test_perplexity_of_a_text(world: World) -> None:
    for name, window, stride in (("text", 64, 24), ("whole", 256, 128)):
        run = world.runs[name].require()
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
    """The loss by transformers' page on perplexity: labels of what was scored before are -100."""
    theirs = Theirs(world.folder / "hf")
    ids = theirs.tokenizer(TEXT, return_tensors="pt").input_ids
    total, count, previous = 0.0, 0, 1
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + window, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : previous - begin] = -100
        with torch.no_grad():
            loss = theirs.model(ids[:, begin:end], labels=labels).loss.item()
        total += loss * (end - previous)
        count += end - previous
        previous = end
        if end == ids.shape[1]:
            break
    return total / count, count


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", ["give --text-file, --tasks or --task"]),
        ("bad values", ["no.txt: no such file", "--window 9999", "--batch-size 0", "--limit 0"]),
        ("empty", ["has 0 token(s)"]),
    ],
)
def test_mistakes_are_named_together(world: World, name: str, words: list[str]) -> None:
    run = world.runs[name].require(2)
    for word in words:
        assert word in run.err


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_missing_lm_eval_is_said(world: World) -> None:
    assert "pip install 'qwen2-ascend[eval]'" in world.runs["no lm-eval"].require(2).err


@pytest.fixture(scope="module")
def hugging_face(world: World) -> dict[tuple[str, str], float]:
    return their_tasks(world, "hf")


def their_tasks(world: World, name: str) -> dict[tuple[str, str], float]:
    return by_hf_model(world.folder / name, list(TASKS), include_path=str(world.folder / "tasks"))


@needs_lm_eval
def test_tasks_of_local_files(world: World, hugging_face: dict[tuple[str, str], float]) -> None:
    run = world.runs["tasks"].require()
    found = metrics(world.folder / "tasks.json")
    assert found == pytest.approx(hugging_face, rel=1e-5)
    assert {task for task, _ in found} == set(TASKS)
    assert found["own_choice", "acc"] == pytest.approx(expected_accuracy(world))
    assert found["own_generate", "exact_match"] == 1.0
    assert "| own_choice | acc |" in run.out


@needs_lm_eval
@pytest.mark.parametrize("name", TOKENIZERS)
def test_scores_are_those_of_the_hf_model_with_every_tokenizer(world: World, name: str) -> None:
    """They agree in bos, what stands before a text, how long windows are, what ends an answer."""
    world.runs[name].require()
    found = metrics(world.folder / f"{name}.json")
    assert found == pytest.approx(their_tasks(world, name), rel=1e-5)
    if name != "other_eos":
        world.runs["tasks"].require()
        assert found != pytest.approx(metrics(world.folder / "tasks.json"), rel=1e-4)


@needs_lm_eval
@pytest.mark.distributed
def test_results_at_tp2_pp2_are_those_of_one_process(
    world: World, hugging_face: dict[tuple[str, str], float]
) -> None:
    output = world.folder / "tp2-pp2.json"
    command = [*TORCHRUN, 4, LAUNCH, "--load", world.folder / "hf"]
    command += ["--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2]
    command += ["--text-file", world.folder / "text.txt", "--window", 64, "--stride", 24]
    command += ["--include-path", world.folder / "tasks", "--tasks", *TASKS]
    run_python(*command, "--output-json", output)
    world.runs["text"].require()
    alone = metrics(world.folder / "text.json")
    assert metrics(output) == pytest.approx(alone | hugging_face, rel=1e-5)


def expected_accuracy(world: World) -> float:
    theirs = Theirs(world.folder / "hf")

    def score(question: str, choice: str) -> float:
        context = theirs.tokenizer(question).input_ids
        ids = theirs.tokenizer(question + choice).input_ids
        with torch.no_grad():
            logs = theirs.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(logs[i - 1, ids[i]].item() for i in range(len(context), len(ids)))

    right = 0
    for row in QUESTIONS:
        scores = [score(row["question"], choice) for choice in row["choices"]]
        right += scores.index(max(scores)) == row["answer"]
    return right / len(QUESTIONS)


@needs_lm_eval
def test_an_unknown_task_is_refused(world: World) -> None:
    assert "lm-eval has no such task" in world.runs["unknown task"].require(2).err
