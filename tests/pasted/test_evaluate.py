"""MindSpeed-LLM's command lines of evaluation start here, over the files that its users have.

What a line finds is what lm-eval's own `hf` model, which is transformers, finds on the same files.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from commands import TORCHRUN, Ended, commands_in, environment, run_python
from evaluation.lm_eval_runs import by_hf_model, metrics, needs_lm_eval
from evaluation.local_files import write_all
from helpers import tiny_config
from inference.worlds import model_with_tokenizer
from pasted.command_lines import CommandLine, command_lines, line_named
from pasted.models import config_of, tiny_line
from qwen2_ascend.errors import UserError
from qwen2_ascend.evaluation.benchmarks import read_benchmark
from qwen2_ascend.evaluation.code_runs import PERMISSION
from qwen2_ascend.evaluation.pasted import EVALUATE_FLAGS
from qwen2_ascend.evaluation.settings import EvaluateSettings, LocalTaskSettings, parse, validate
from qwen2_ascend.prompt_types import prompt_template

LAUNCH = Path(__file__).parents[2] / "launch" / "evaluate_qwen2.py"
LINES = command_lines("evaluate")
CONTEXT = 4096
"""The examples of gsm8k and bbh have to fit, a byte or two a token."""
CONFIG = tiny_config(vocab_size=400, max_position_embeddings=CONTEXT)
MMLU = "2.2.0/qwen25/evaluate_qwen25_7b_ptd"
WORDS = "2.2.0/qwen25_math/evaluate_qwen25_math_7b_ptd"
CODE = "2.2.0/qwen25_coder/evaluate_qwen25_coder_7b_ptd"
TUNED = "2.2.0/qwen2/evaluate_qwen2_7b_full_ptd"
NEW = 12


def settings_of(line: CommandLine) -> EvaluateSettings:
    return parse([word if word != "PATH" else "somewhere" for word in line.flags])


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.name)
def test_every_line_starts(line: CommandLine) -> None:
    settings, config = settings_of(line), config_of(line)
    validate(settings, config, line.world_size)
    assert settings.local.task == tuple(line.values("--task"))
    notes = "\n".join(settings.model.notes(settings.pasted, EVALUATE_FLAGS, config))
    assert all(flag in notes for flag, _ in settings.pasted)
    batch = line.values("--evaluation-batch-size") if "--evaluation-batch-size" in line.flags else 4
    assert settings.batch_size == (int(batch[0]) if isinstance(batch, list) else batch)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--task", "hellaswag"], "--task hellaswag: there is no such benchmark"),
        (["--task", "mmlu", "gsm8k"], "2 --task and 1 --task-data-path"),
        (
            ["--task", "mmlu", "mmlu_ppl", "--task-data-path", "a", "b"],
            "asks for the same twice",
        ),
        (["--task", "boolq", "--alternative-prompt"], "--alternative-prompt is for --task mmlu"),
        (["--chain-of-thought"], "--chain-of-thought is for --task bbh"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0 must be at least 1"),
        (["--prompt-type", "qwen"], "--no-chat-template goes neither with"),
        (["--max-eval-samples", "0"], "--limit 0"),
        (["--origin-postprocess"], "is not supported"),
        (["--instruction-template", "a"], "--include-path"),
        (["--padded-vocab-size", "100"], "below the vocabulary"),
        (["--window", "64"], "--window is for --text-file; leave it out"),
        (["--stride", "64"], "--stride is for --text-file; leave it out"),
        (["--include-path", "."], "--include-path is for --tasks; leave it out"),
    ],
)
def test_what_does_not_hold_is_refused(more: list[str], words: str) -> None:
    line = line_named("evaluate", MMLU)
    with pytest.raises(UserError) as caught:
        validate(settings_of(line._replace(flags=[*line.flags, *more])), config_of(line), 8)
    (fault,) = caught.value.faults
    assert words in fault


@pytest.mark.parametrize(
    "flags", ["--limit 3", "--num-fewshot 0", "--system-prompt a", "--apply-chat-template"]
)
def test_flags_of_questions_need_some(flags: str) -> None:
    """Perplexity is measured on a text as it is, and on the whole of it."""

    def faults(*more: str) -> list[str]:
        words = ["--load", "m", "--text-file", __file__, *flags.split(), *more]
        with pytest.raises(UserError) as caught:
            validate(parse(words), CONFIG, 0)
        return list(caught.value.faults[1:])  # the first is about the processes

    assert faults() == [f"{flags.split()[0]} is for --tasks and --task; leave it out."]
    assert faults("--tasks", "hellaswag") == []
    assert faults("--task", "mmlu", "--task-data-path", "a") == []


# --- run truly, on a tiny model -------------------------------------------------------------------


class World(NamedTuple):
    folder: Path
    data: dict[str, Path]
    runs: Mapping[str, Ended]


def _flags(name: str, folder: Path, data: Path, *more: object, **changes: object) -> list[str]:
    """A published line for the tiny model, computing on the CPU in fp32."""
    paths: dict[str, str | Path] = {"--load": folder / "hf", "--task-data-path": data}
    flags = tiny_line(line_named("evaluate", name), CONFIG, paths, **changes)
    flags = [flag for flag in flags if flag not in ("--bf16", "--fp16")]
    return [*flags, "--fp32", *map(str, more)]


def _others(folder: Path, data: dict[str, Path]) -> list[str]:
    """A line with every other benchmark for its task."""
    names = [name for name in data if name not in ("mmlu", "human_eval")]
    flags = _flags(MMLU, folder, Path("-"), "--output-json", folder / "others.json")
    at, end = flags.index("--task"), flags.index("--no-chat-template")
    tasks = ["--task", *names, "--task-data-path", *(str(data[name]) for name in names)]
    return [*flags[:at], *tasks, *flags[end:], "--max-new-tokens", str(NEW)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("pasted")
    model_with_tokenizer(folder / "hf", max_position_embeddings=CONTEXT)
    data = write_all(folder / "data")
    out = "--output-json"
    commands = {
        "mmlu": _flags(MMLU, folder, data["mmlu"], out, folder / "mmlu.json"),
        "words": _flags(
            WORDS, folder, data["mmlu"], out, folder / "words.json", max_new_tokens=NEW
        ),
        "tuned": _flags(TUNED, folder, data["mmlu"], out, folder / "tuned.json"),
        "code": _flags(CODE, folder, data["human_eval"], out, folder / "code.json"),
        "others": _others(folder, data),
        "no dev": _flags(MMLU, folder, data["boolq"]),
    }
    given = {name: {"program": "evaluate", "flags": flags} for name, flags in commands.items()}
    with commands_in(folder, given) as runs:
        yield World(folder, data, runs)


def expected(
    world: World, names: list[str], *, template: str | None = None, **wishes: Any
) -> dict[tuple[str, str], float]:
    """(task, metric) to value, by lm-eval's `hf` model on the same tasks."""
    from qwen2_ascend.evaluation.local_tasks import local_tasks

    folder = world.folder / "hf"
    if template is not None:
        folder = world.folder / "templated"
        shutil.copytree(world.folder / "hf", folder)
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    made = LocalTaskSettings(**wishes)
    benchmarks = [read_benchmark(name, world.data[name], None) for name in names]
    tasks = [task for one in benchmarks for task in local_tasks(one, made, lambda row, text: {})]
    return by_hf_model(folder, tasks, in_turns=template is not None, include_defaults=False)


def without_totals(found: dict[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    return {key: value for key, value in found.items() if key[0] not in ("mmlu", "bbh", "agieval")}


@needs_lm_eval
def test_mmlu_is_what_the_hf_model_finds(world: World) -> None:
    run = world.runs["mmlu"].require()
    found = metrics(world.folder / "mmlu.json")
    assert without_totals(found) == pytest.approx(expected(world, ["mmlu"]), rel=1e-5)
    algebra, religions = (
        found[f"mmlu_{name}", "acc"] for name in ("abstract_algebra", "world_religions")
    )
    assert found["mmlu", "acc"] == pytest.approx((2 * algebra + 3 * religions) / 5)
    assert "mmlu: 5 question(s) in 2 file(s)" in run.err
    assert "5 example(s) in front of each" in run.err
    assert "--max-new-tokens: choices are scored, nothing is generated" in run.err
    assert "questions are asked as they are" in run.err
    assert "| mmlu | acc |" in run.out


@needs_lm_eval
def test_the_alternative_prompt_is_answered_in_words(world: World) -> None:
    world.runs["words"].require()
    found = without_totals(metrics(world.folder / "words.json"))
    wishes = {"alternative_prompt": True, "max_new_tokens": NEW}
    assert found == pytest.approx(expected(world, ["mmlu"], **wishes))


@needs_lm_eval
def test_a_prompt_type_asks_in_its_turns(world: World) -> None:
    run = world.runs["tuned"].require()
    found = without_totals(metrics(world.folder / "tuned.json"))
    wanted = expected(world, ["mmlu"], template=prompt_template("qwen"))
    assert found == pytest.approx(wanted, rel=1e-5)
    assert "questions are asked by a chat template" in run.err


@needs_lm_eval
def test_the_other_benchmarks_are_what_the_hf_model_finds(world: World) -> None:
    world.runs["others"].require()
    found = without_totals(metrics(world.folder / "others.json"))
    names = [name for name in world.data if name not in ("mmlu", "human_eval")]
    wanted = expected(world, names, max_new_tokens=NEW)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert len({task for task, _ in found}) == 8


@needs_lm_eval
def test_programs_are_kept_and_not_run(world: World) -> None:
    run = world.runs["code"].require()
    assert PERMISSION not in os.environ
    assert "not run, so there is no pass@1: code of a model can do harm" in run.err
    assert f"set {PERMISSION}=1 in the environment" in run.err
    found = metrics(world.folder / "code.json")
    assert set(found) == {("humaneval", "is_python")}
    lines = (world.folder / "code_human_eval.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["task_id"] for line in lines] == ["HumanEval/0", "HumanEval/1"]


@needs_lm_eval
def test_files_of_another_benchmark_are_refused(world: World) -> None:
    assert "has no file *.csv for --task mmlu" in world.runs["no dev"].require(2).err


@needs_lm_eval
@pytest.mark.distributed
def test_a_line_at_tp2_pp2_finds_the_same(world: World) -> None:
    """Programs run, once, where the user has said so."""
    output = world.folder / "tp2-pp2.json"
    changes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    flags = _flags(MMLU, world.folder, world.data["mmlu"], "--output-json", output, **changes)
    at, end = flags.index("--task"), flags.index("--no-chat-template")
    paths = [world.data["mmlu"], world.data["human_eval"]]
    tasks = ["--task", "mmlu", "human_eval", "--task-data-path", *map(str, paths)]
    command = [*TORCHRUN, 4, LAUNCH, *flags[:at], *tasks, *flags[end:]]
    run_python(*command, environ=environment(**{PERMISSION: "1"}))
    found = metrics(output)
    assert found.pop(("humaneval", "pass@1")) == 0.0  # a model of random weights
    found.pop(("humaneval", "is_python"))
    world.runs["mmlu"].require()
    assert found == pytest.approx(metrics(world.folder / "mmlu.json"), rel=1e-5)
    assert len((world.folder / "tp2-pp2_human_eval.jsonl").read_text().splitlines()) == 2
