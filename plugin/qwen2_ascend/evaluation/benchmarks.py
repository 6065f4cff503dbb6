"""The benchmarks that MindSpeed-LLM evaluates, from the files that its users have.

    mmlu        DIR/SUBJECT_test.csv (question, A, B, C, D, answer; no head), DIR/../dev/..._dev.csv
    cmmlu       DIR/SUBJECT.csv (with a head), DIR/../dev/SUBJECT.csv
    ceval       DIR/SUBJECT_val.csv (with a head), DIR/../dev/SUBJECT_dev.csv
    boolq       DIR/dev.jsonl       {"question", "passage", "answer": true or false}
    gsm8k       DIR/*.jsonl         {"question", "answer"}; test.jsonl alone, where there is one
    bbh         DIR/SUBJECT.json    {"examples": [{"input", "target"}, ...]}
    agieval     DIR/SUBJECT.jsonl   {"passage", "question", "options", "label", "answer"}
    human_eval  DIR/*.jsonl         {"task_id", "prompt", "entry_point", "test"}

What is read here has the columns of the data sets that lm-eval's tasks of these names are written
for. Nothing here imports lm-eval.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from qwen2_ascend.errors import UserError, at_most, raise_if
from qwen2_ascend.files import json_value, read_text

LETTERS = ("A", "B", "C", "D")
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The questions of one file."""

    name: str
    path: Path
    questions: Sequence[Row]
    examples: Sequence[Row] = ()
    """What may stand, with their answers, in front of a question."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark's questions."""

    name: str
    folder: Path
    num_examples: int | None
    """How many stand in front of each question; None takes what lm-eval's task says."""
    subjects: Sequence[Subject]

    def describe(self) -> str:
        """One line for a log."""
        count = sum(len(subject.questions) for subject in self.subjects)
        words = f"{self.name}: {count} question(s) in {len(self.subjects)} file(s) of {self.folder}"
        if self.num_examples is None:
            return words
        return f"{words}, {self.num_examples} example(s) in front of each"


class Kind(NamedTuple):
    """How the files of a benchmark are read."""

    pattern: str
    question: Callable[[Any], Row]
    """Makes a question in the data set's columns of a line; raises ValueError if it is none."""
    num_examples: int | None = None
    suffix: str | None = None
    """The suffix of the files with examples, in the folder dev beside; None where there are
    none."""
    columns: Sequence[str] = ()
    """These are the columns of a CSV file without a head."""


def read_benchmark(name: str, folder: Path, num_examples: int | None) -> Benchmark:
    """A benchmark of a folder.

    Args:
        name: one of KINDS.
        folder: the one that MindSpeed-LLM's --task-data-path names.
        num_examples: in front of each question; None for the benchmark's own number.

    Raises:
        UserError: files that are missing or hold something else; many at once.
    """
    kind = KINDS[name]
    wanted = kind.num_examples if num_examples is None else num_examples
    if not folder.is_dir():
        raise UserError(f"--task-data-path {folder}: no such folder.")
    paths = sorted(path for path in folder.glob(kind.pattern) if path.is_file())
    if name == "gsm8k" and folder / "test.jsonl" in paths:
        paths = [folder / "test.jsonl"]
    if not paths:
        raise UserError(f"--task-data-path {folder}: has no file {kind.pattern} for --task {name}.")
    reader = _Reader(kind, folder, wanted or 0)
    subjects = [reader.subject(path) for path in paths]
    raise_if(at_most(reader.faults))
    return Benchmark(name=name, folder=folder, num_examples=wanted, subjects=subjects)


@dataclass(frozen=True)
class _Reader:
    """Reads a benchmark's files and remembers what is wrong with them."""

    kind: Kind
    folder: Path
    num_examples: int
    faults: list[str] = field(default_factory=list)

    def subject(self, path: Path) -> Subject:
        name = re.sub(r"_(test|val|dev)$", "", path.stem)
        examples: Sequence[Row] = ()
        if self.kind.suffix is not None and self.num_examples:
            examples = self._examples(name)
        return Subject(name=name, path=path, questions=self._rows(path), examples=examples)

    def _examples(self, name: str) -> Sequence[Row]:
        path = self.folder.resolve().parent / "dev" / f"{name}{self.kind.suffix}.csv"
        if not path.is_file():
            self.faults.append(
                f"{path}: no such file, and --num-fewshot is {self.num_examples}; put the "
                "benchmark's folder dev there, or say --num-fewshot 0."
            )
            return ()
        examples = self._rows(path)
        if examples and len(examples) < self.num_examples:
            self.faults.append(
                f"{path}: has {len(examples)} example(s); say --num-fewshot {len(examples)}."
            )
        return examples

    def _rows(self, path: Path) -> Sequence[Row]:
        rows: list[Row] = []
        try:
            for where, raw in _lines(path, self.kind.columns):
                try:
                    rows.append(self.kind.question(raw))
                except (ValueError, KeyError, TypeError) as error:
                    self.faults.append(f"{where}: is no question: {_what(error)}.")
        except (OSError, ValueError, csv.Error) as error:
            self.faults.append(f"{path}: cannot be read: {error}.")
            return ()
        if not rows and not any(fault.startswith(str(path)) for fault in self.faults):
            self.faults.append(f"{path}: has no questions.")
        return rows


def _lines(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(where, what is there) of each question of a file."""
    text = read_text(path).removeprefix("\ufeff")
    if path.suffix == ".json":
        raw = json_value(text)
        if not isinstance(raw, dict) or not isinstance(raw.get("examples"), list):
            raise ValueError('it has no list "examples"')
        yield from ((f"{path}, example {i}", row) for i, row in enumerate(raw["examples"], 1))
    elif path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{path}:{number}", json_value(line)
    else:
        table = csv.reader(text.splitlines(keepends=True))
        head = list(columns) or next(table, [])
        for row in filter(None, table):
            if len(row) < len(head):
                raise ValueError(f"line {table.line_num} has {len(row)} column(s), not {len(head)}")
            yield f"{path}:{table.line_num}", dict(zip(head, row, strict=False))


def _what(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)


def _letter(answer: Any) -> str:
    if answer not in LETTERS:
        raise ValueError(f"its answer is {answer!r}, not one of {', '.join(LETTERS)}")
    return answer


def _mmlu(raw: Mapping[str, Any]) -> Row:
    answer = LETTERS.index(_letter(raw["answer"]))
    choices = [raw[letter] for letter in LETTERS]
    return {"question": raw["question"], "choices": choices, "answer": answer}


def _lettered(question: str, answer: str) -> Callable[[Mapping[str, Any]], Row]:
    """Reads a question with four choices and a letter, from columns of these names."""

    def read(raw: Mapping[str, Any]) -> Row:
        columns = {name: raw[name] for name in (question, *LETTERS)}
        return {**columns, answer: _letter(raw[answer])}

    return read


def _boolq(raw: Mapping[str, Any]) -> Row:
    if not isinstance(raw["answer"], bool):
        raise ValueError(f"its answer is {raw['answer']!r}, not true or false")
    return {**_texts("question", "passage")(raw), "label": int(raw["answer"])}


def _texts(*names: str) -> Callable[[Mapping[str, Any]], Row]:
    """Reads a question whose columns of these names are texts."""
    return lambda raw: {name: _text(raw, name) for name in names}


def _agieval(raw: Mapping[str, Any]) -> Row:
    """AGIEval's own prompt without examples, in the language of the question."""
    passage, question, options = raw["passage"] or "", _text(raw, "question"), raw["options"]
    is_chinese = re.search(r"[\u4e00-\u9fff]", passage + question) is not None
    ask = "问题：" if is_chinese else "Q: "  # noqa: RUF001
    if not options:
        end = "答案：" if is_chinese else "A: The answer is"  # noqa: RUF001
        return {"query": f"{passage}{ask}{question}\n{end}", "answer": str(raw["answer"])}
    label = raw["label"]
    labels = list(label) if isinstance(label, (list, str)) else []
    gold = ["ABCDEFG".index(letter) for letter in labels]
    if not gold or max(gold) >= len(options):
        raise ValueError(f"its label is {label!r}, and it has {len(options)} options")
    last = "ABCDEFG"[len(options) - 1]
    given = " ".join(options)
    if is_chinese:
        end = f"选项：{given}\n答案：从A到{last}, 我们应选择"  # noqa: RUF001
    else:
        end = f"Answer Choices: {given}\nA: Among A through {last}, the answer is"
    query = f"{passage}{ask}{question} {end}"
    return {"query": query, "choices": list(options), "gold": gold}


def _text(raw: Mapping[str, Any], name: str) -> str:
    if not isinstance(raw[name], str):
        raise ValueError(f"its {name} is {raw[name]!r}, not a text")
    return raw[name]


KINDS: Mapping[str, Kind] = {
    "mmlu": Kind("*.csv", _mmlu, 5, "_dev", ("question", *LETTERS, "answer")),
    "cmmlu": Kind("*.csv", _lettered("Question", "Answer"), 5, ""),
    "ceval": Kind("*.csv", _lettered("question", "answer"), 5, "_dev"),
    "boolq": Kind("*dev*.jsonl", _boolq),
    "gsm8k": Kind("*.jsonl", _texts("question", "answer"), 3),
    "bbh": Kind("*.json", _texts("input", "target")),
    "agieval": Kind("*.jsonl", _agieval),
    "human_eval": Kind("*.jsonl", _texts("task_id", "prompt", "entry_point", "test")),
}
"""The kinds by the name that --task takes."""
