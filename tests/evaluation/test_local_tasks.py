"""Benchmarks of local files: what is read, the prompts that lm-eval makes of it, and programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation.lm_eval_runs import needs_lm_eval
from evaluation.local_files import WRITERS, questions, write_all, write_csv, write_lines
from qwen2_ascend.errors import UserError
from qwen2_ascend.evaluation import code_runs
from qwen2_ascend.evaluation.benchmarks import KINDS, read_benchmark
from qwen2_ascend.evaluation.code_runs import PERMISSION, is_python, passes
from qwen2_ascend.evaluation.programs import Programs
from qwen2_ascend.evaluation.settings import LocalTaskSettings


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_all(tmp_path_factory.mktemp("benchmarks"))


def test_every_benchmark_has_files_here() -> None:
    assert set(WRITERS) == set(KINDS)


def test_what_is_read(folders: dict[str, Path]) -> None:
    found = {name: read_benchmark(name, path, None) for name, path in folders.items()}
    names = {name: [subject.name for subject in one.subjects] for name, one in found.items()}
    assert names["mmlu"] == ["abstract_algebra", "world_religions"]
    assert names["boolq"] == ["dev"] and names["gsm8k"] == ["test"]
    row = questions(1, start=0)[0]
    assert found["mmlu"].subjects[0].questions[0] == {
        "question": row[0],
        "choices": row[1:5],
        "answer": "ABCD".index(row[5]),
    }
    assert len(found["mmlu"].subjects[0].examples) == 5
    assert [question["label"] for question in found["boolq"].subjects[0].questions] == [1, 0]
    chosen = found["agieval"].subjects[1].questions[0]
    assert chosen["query"] == (
        "Q: 1 + 1? Answer Choices: (A)1 (B)2\nA: Among A through B, the answer is"
    )
    assert chosen["gold"] == [1]
    assert "5 question(s) in 2 file(s)" in found["mmlu"].describe()
    assert read_benchmark("mmlu", folders["mmlu"], 0).subjects[0].examples == ()


def test_what_is_wrong_with_files_is_said_at_once(tmp_path: Path) -> None:
    bad = questions(2, start=0)
    bad[1][5] = "E"
    write_csv(tmp_path / "test" / "anatomy_test.csv", bad)
    write_csv(tmp_path / "test" / "virology_test.csv", [["a", "b"]])
    with pytest.raises(UserError) as caught:
        read_benchmark("mmlu", tmp_path / "test", None)
    told = "\n".join(caught.value.faults)
    assert "anatomy_test.csv:2: is no question: its answer is 'E'" in told
    assert "virology_test.csv: cannot be read: line 1 has 2 column(s), not 6" in told
    assert "say --num-fewshot 0" in told


@pytest.mark.parametrize(
    ("name", "file", "row", "words"),
    [
        ("boolq", "dev.jsonl", {"question": "a", "passage": "b", "answer": "yes"}, "true or false"),
        ("gsm8k", "test.jsonl", {"question": "a"}, "it lacks 'answer'"),
        ("human_eval", "a.jsonl", [1], "is no question"),
        (
            "agieval",
            "sat-math.jsonl",
            {"passage": "", "question": "a", "options": ["(A)1"], "label": "C", "answer": None},
            "its label is 'C', and it has 1 options",
        ),
    ],
)
def test_a_line_that_is_no_question(
    tmp_path: Path, name: str, file: str, row: Any, words: str
) -> None:
    write_lines(tmp_path / file, [row])
    with pytest.raises(UserError, match="is no question") as caught:
        read_benchmark(name, tmp_path, None)
    assert words in caught.value.faults[0]
    with pytest.raises(UserError, match="no such folder"):
        read_benchmark(name, tmp_path / "nowhere", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no file"):
        read_benchmark(name, tmp_path / "empty", None)


def contexts(folder: Path, name: str, examples: int | None = None, **wishes: Any) -> list[str]:
    """The text that lm-eval gives the model for each question of the first file."""
    from qwen2_ascend.evaluation.local_tasks import local_tasks

    benchmark = read_benchmark(name, folder, examples)
    task = local_tasks(benchmark, LocalTaskSettings(**wishes), lambda row, text: {})[0]
    task.build_all_requests(limit=None, rank=0, world_size=1)
    return list(dict.fromkeys(instance.args[0] for instance in task.instances))


def mmlu_question(row: list[str]) -> str:
    return f"{row[0]}\nA. {row[1]}\nB. {row[2]}\nC. {row[3]}\nD. {row[4]}\nAnswer:"


@needs_lm_eval
def test_mmlu_is_asked_with_the_five_examples_of_the_folder_dev(folders: dict[str, Path]) -> None:
    examples = [f"{mmlu_question(row)} {row[5]}\n\n" for row in questions(5, start=40)]
    head = "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
    expected = [head + "".join(examples) + mmlu_question(row) for row in questions(2, start=0)]
    assert contexts(folders["mmlu"], "mmlu") == expected
    assert contexts(folders["mmlu"], "mmlu", 0) == [
        head + mmlu_question(row) for row in questions(2, start=0)
    ]


@needs_lm_eval
def test_mmlu_by_the_alternative_prompt(folders: dict[str, Path]) -> None:
    ask = (
        "There is a single choice question about abstract algebra. Answer the question by replying "
        "A, B, C or D. \nQuestion: "
    )
    shown = [f"{ask}{mmlu_question(row)} \n{row[5]}\n\n" for row in questions(5, start=40)]
    expected = ["".join(shown) + ask + mmlu_question(row) + " " for row in questions(2, start=0)]
    assert contexts(folders["mmlu"], "mmlu", alternative_prompt=True) == expected


@needs_lm_eval
def test_the_others_are_asked_as_lm_eval_asks(folders: dict[str, Path]) -> None:
    asked = {name: contexts(folders[name], name)[0] for name in folders}
    assert asked["boolq"] == "the of and 日本\nQuestion: is it that?\nAnswer:"
    assert asked["gsm8k"].startswith("Q: There are 15 trees") and asked["gsm8k"].count("Q: ") == 4
    assert asked["gsm8k"].endswith("Q: How many are 2 and 3?\nA:")
    assert asked["bbh"].count("Q: ") == 4 and asked["bbh"].endswith("Q: not ( True ) is\nA:")
    assert asked["human_eval"] == "def f0(x):\n    return"
    assert asked["ceval"].count("答案：") == asked["cmmlu"].count("答案：") == 6  # noqa: RUF001
    thinking = contexts(folders["bbh"], "bbh", chain_of_thought=True)[0]
    assert "Let's think step by step" in thinking


@needs_lm_eval
def test_a_file_that_lm_eval_has_no_task_for(tmp_path: Path) -> None:
    from qwen2_ascend.evaluation.local_tasks import local_tasks

    write_csv(tmp_path / "test" / "cooking_test.csv", questions(1, start=0))
    with pytest.raises(UserError, match="no task mmlu for cooking"):
        local_tasks(
            read_benchmark("mmlu", tmp_path / "test", 0), LocalTaskSettings(), lambda row, text: {}
        )


@needs_lm_eval
@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B\n\nThere is a single", "B"),
        ("**C**", "C"),
        ("(D) because A is wrong", "D"),
        ("A group is closed. So the answer is (B).", "B"),
        ("Answer: C", "C"),
        ("so $\\boxed{D}$", "D"),
        ("答案是 B。", "B"),
        ("It has to be C, of course", "C"),
        ("none of these", None),
        ("", None),
    ],
)
def test_the_letter_of_an_answer(answer: str, letter: str | None) -> None:
    from qwen2_ascend.evaluation.local_tasks import chosen_letter

    assert chosen_letter(answer) == letter


# --- programs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "does_pass"),
    [
        ("assert 1 + 1 == 2", True),
        ("assert 1 + 1 == 3", False),
        ("raise SystemExit(0)", False),
        ("import os\nos._exit(0)", False),
        ("def f(:", False),
        ("print('passed')", True),
        ("x = bytearray(10**11)", False),
        ("open('big', 'wb').write(bytes(2**25))", False),
        ("import sys\nassert sys.stdin.read() == ''", True),
    ],
)
def test_a_program_passes_if_it_comes_to_its_end(
    program: str, does_pass: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PERMISSION, "1")
    assert passes(program) == does_pass


def test_a_program_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PERMISSION, "1")
    monkeypatch.setattr(code_runs, "SECONDS", 1)
    assert not passes("import time\ntime.sleep(3600)")


def test_nothing_runs_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PERMISSION, raising=False)
    question = {"task_id": "a/0", "prompt": "", "entry_point": "f", "test": "def check(f): pass"}
    programs = Programs(tmp_path / "out.jsonl", is_first=True)
    mark = tmp_path / "mark"
    continuation = f"open({str(mark)!r}, 'w')\nf = 1"
    assert programs(question, continuation) == {"is_python": 1.0}
    assert programs(question, "def f(:") == {"is_python": 0.0}
    assert not mark.exists()
    with pytest.raises(AssertionError):
        passes(continuation)
    programs.write()
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert lines[0] == {"task_id": "a/0", "completion": continuation}
    assert f"set {PERMISSION}=1" in programs.describe()
    monkeypatch.setenv(PERMISSION, "1")
    allowed = Programs(tmp_path / "out.jsonl", is_first=True)
    assert allowed(question, continuation) == {"is_python": 1.0, "pass@1": 1.0}
    assert mark.exists()
    mark.unlink()
    other = Programs(tmp_path / "other.jsonl", is_first=False)
    assert other(question, continuation) == {"is_python": 0.0}
    other.write()
    assert not mark.exists() and not (tmp_path / "other.jsonl").exists()


def test_what_is_no_program() -> None:
    assert is_python("def f():\n    return 1")
    assert not is_python("def f(:") and not is_python("\0") and not is_python("(" * 10000)
