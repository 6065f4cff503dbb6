"""Small benchmarks in the files that MindSpeed-LLM's users have."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data.chats import write_rows
from data.corpora import WORDS as TEXT

LETTERS = "ABCD"
WORDS = TEXT.split()[:20]


def questions(count: int, *, start: int) -> list[list[str]]:
    """Rows of question, four choices and letter."""
    rows = []
    for i in range(start, start + count):
        words = [WORDS[(7 * i + 3 * k) % len(WORDS)] for k in range(8)]
        rows.append([" ".join(words[:4]) + ", 1", *words[4:], LETTERS[i % 4]])
    return rows


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def write_lines(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, rows)


def write_mmlu(folder: Path) -> Path:
    """data/test and data/dev of its archive, two subjects of it."""
    for number, subject in enumerate(("abstract_algebra", "world_religions")):
        write_csv(folder / f"test/{subject}_test.csv", questions(2 + number, start=10 * number))
        write_csv(folder / f"dev/{subject}_dev.csv", questions(5, start=40 + 10 * number))
    return folder / "test"


def write_cmmlu(folder: Path) -> Path:
    for name, count, start in (("test", 2, 3), ("dev", 5, 60)):
        rows = [[i, *row] for i, row in enumerate(questions(count, start=start))]
        head = ["", "Question", *LETTERS, "Answer"]
        write_csv(folder / name / "agronomy.csv", [head, *rows])
    return folder / "test"


def write_ceval(folder: Path) -> Path:
    for name, count, start in (("val", 2, 5), ("dev", 5, 70)):
        rows = [[i, *row] for i, row in enumerate(questions(count, start=start))]
        if name == "dev":
            rows = [[*row, "because"] for row in rows]
        head = ["id", "question", *LETTERS, "answer", *(["explanation"] if name == "dev" else [])]
        write_csv(folder / name / f"accountant_{name}.csv", [head, *rows])
    return folder / "val"


def write_boolq(folder: Path) -> Path:
    rows = [
        {"question": "is it that", "title": "it", "passage": "the of and 日本", "answer": True},
        {"question": "was he", "title": "he", "passage": "to be in a", "answer": False},
    ]
    write_lines(folder / "dev.jsonl", rows)
    write_lines(folder / "train.jsonl", [{"question": "not to be read"}])
    return folder


def write_gsm8k(folder: Path) -> Path:
    rows = [
        {"question": "How many are 2 and 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
        {"question": "How many are 7 and 4?", "answer": "7 + 4 = <<7+4=11>>11\n#### 11"},
    ]
    write_lines(folder / "test.jsonl", rows)
    write_lines(folder / "train.jsonl", rows)
    return folder


def write_bbh(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for subject in ("boolean_expressions", "word_sorting"):
        rows = [{"input": "not ( True ) is", "target": "False"}, {"input": "True", "target": "a"}]
        text = json.dumps({"canary": "-", "examples": rows})
        (folder / f"{subject}.json").write_text(text, encoding="utf-8")
    return folder


def write_agieval(folder: Path) -> Path:
    chosen = {"passage": None, "question": "1 + 1?", "options": ["(A)1", "(B)2"], "label": "B"}
    write_lines(folder / "sat-math.jsonl", [{**chosen, "answer": None}])
    filled = {"passage": "", "question": "求 1 + 1", "options": None, "label": None, "answer": "2"}
    write_lines(folder / "gaokao-mathcloze.jsonl", [filled])
    return folder


def write_human_eval(folder: Path) -> Path:
    rows = [
        {
            "task_id": f"HumanEval/{i}",
            "prompt": f"def f{i}(x):\n    return",
            "entry_point": f"f{i}",
            "canonical_solution": " x\n",
            "test": "def check(f):\n    assert f(1) == 1\n",
        }
        for i in range(2)
    ]
    write_lines(folder / "HumanEval.jsonl", rows)
    return folder


WRITERS = {
    "mmlu": write_mmlu,
    "cmmlu": write_cmmlu,
    "ceval": write_ceval,
    "boolq": write_boolq,
    "gsm8k": write_gsm8k,
    "bbh": write_bbh,
    "agieval": write_agieval,
    "human_eval": write_human_eval,
}


def write_all(folder: Path) -> dict[str, Path]:
    """Every benchmark, by its name the folder that --task-data-path names."""
    return {name: write(folder / name) for name, write in WRITERS.items()}
