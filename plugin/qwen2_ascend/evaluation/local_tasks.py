"""lm-eval's tasks over the files of `benchmarks`: its prompts, its examples, its metrics.

A task's definition is the one that the installed lm-eval has for the data set on the hub. Only
where the questions come from is another, and what a flag of MindSpeed-LLM's says.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from lm_eval import tasks as lm_eval_tasks  # pyright: ignore[reportMissingImports]  # an extra
from lm_eval.api.task import ConfigurableTask  # pyright: ignore[reportMissingImports]

from qwen2_ascend.errors import UserError
from qwen2_ascend.evaluation.benchmarks import LETTERS, Benchmark, Subject
from qwen2_ascend.evaluation.settings import LocalTaskSettings
from qwen2_ascend.files import read_text

DEFINITIONS = {
    "mmlu": "mmlu/default/mmlu_{subject}.yaml",
    "cmmlu": "cmmlu/cmmlu_{subject}.yaml",
    "ceval": "ceval/ceval-valid_{subject}.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "gsm8k": "gsm8k/gsm8k-cot.yaml",
    "bbh": "bbh/fewshot/{subject}.yaml",
    "bbh by thinking": "bbh/cot_fewshot/{subject}.yaml",
    "agieval": "agieval/{subject}.yaml",
    "human_eval": "humaneval/humaneval.yaml",
}
"""Files of lm-eval's folder of tasks."""
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the largest number of new tokens; the first that is there counts."""
ASKED = (
    "There is a single choice question about {}. Answer the question by replying A, B, C or D. \n"
    "Question: "
)
"""What --alternative-prompt writes before each question; it is OpenCompass's prompt for MMLU."""
ANSWERS = (
    r"(?:answer|option)(?:\s+option)?\s*(?:is|:)+\s*\**\s*\(?([A-D])\b",
    r"\\boxed\{\s*(?:\\text\{)?\s*\(?([A-D])\b",
    r"答案[^A-D\n]{0,8}([A-D])",
    r"\A\W*([A-D])\b",
    r"\b([A-D])\b",
)
"""How an answer names its letter, the plainest way first."""


class LocalTask(ConfigurableTask):
    """A task of lm-eval's over questions that are read already, by the name of their split."""

    def __init__(self, config: dict[str, Any], splits: Mapping[str, Sequence[Any]]) -> None:
        self._splits = splits
        super().__init__(config=config)

    def download(self, *_: Any, **__: Any) -> None:
        """Takes the questions; there is nothing to download."""
        self.dataset = {name: Dataset.from_list(list(rows)) for name, rows in self._splits.items()}


OnProgram = Callable[[Any, str], Mapping[str, float]]
"""Called with a question of human_eval's and the model's continuation; gives its metrics."""


def local_tasks(
    benchmark: Benchmark, wishes: LocalTaskSettings, on_program: OnProgram
) -> list[LocalTask]:
    """One task for each of a benchmark's files.

    Raises:
        UserError: files that lm-eval has no task for.
    """
    configs = {
        subject.name: _definition(benchmark, subject, wishes) for subject in benchmark.subjects
    }
    if unknown := [name for name, config in configs.items() if config is None]:
        raise UserError(
            f"--task-data-path {benchmark.folder}: lm-eval has no task {benchmark.name} for "
            f"{', '.join(unknown)}; take these files out of the folder."
        )
    made = []
    for subject in benchmark.subjects:
        config: Any = configs[subject.name]
        splits = {"test": subject.questions}
        if subject.examples:
            splits["dev"] = subject.examples
        if benchmark.name == "human_eval":
            config |= _of_programs(on_program)
        made.append(LocalTask(_adapted(config, benchmark, subject, wishes), splits))
    return made


def chosen_letter(answer: str) -> str | None:
    """The letter that an answer in words names; None where it names none."""
    for pattern in ANSWERS:
        if found := re.search(pattern, answer, re.IGNORECASE if "answer" in pattern else 0):
            return found[1].upper()
    return None


def _definition(
    benchmark: Benchmark, subject: Subject, wishes: LocalTaskSettings
) -> dict[str, Any] | None:
    """lm-eval's own, or None."""
    name = benchmark.name
    if name == "bbh" and wishes.chain_of_thought:
        name += " by thinking"
    path = Path(lm_eval_tasks.__file__).parent / DEFINITIONS[name].format(subject=subject.name)
    return _read(path) if path.is_file() else None


def _adapted(
    config: dict[str, Any], benchmark: Benchmark, subject: Subject, wishes: LocalTaskSettings
) -> dict[str, Any]:
    """A definition as this project's questions and the flags want it."""
    config = {key: value for key, value in config.items() if key not in ("tag", "group", "include")}
    config |= {
        "dataset_path": str(subject.path),
        "dataset_name": None,
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": "dev" if subject.examples else None,
    }
    if benchmark.name == "gsm8k":
        config["task"] += "" if subject.name == "test" else f"_{subject.name}"
    if benchmark.num_examples is not None:
        config["num_fewshot"] = benchmark.num_examples
    if wishes.alternative_prompt:
        config |= _asking_for_a_letter(subject.name.replace("_", " "))
    config = {key: _resolved(value) for key, value in config.items() if value is not None}
    if wishes.max_new_tokens is not None and config["output_type"] == "generate_until":
        options = {k: v for k, v in config["generation_kwargs"].items() if k not in LIMITS}
        config["generation_kwargs"] = {**options, "max_gen_toks": wishes.max_new_tokens}
    return config


def _asking_for_a_letter(subject: str) -> dict[str, Any]:
    """A definition of mmlu's questions that the model answers in words."""

    def text_of(row: Any) -> str:
        choices = zip(LETTERS, row["choices"], strict=True)
        lines = "".join(f"\n{letter}. {text}" for letter, text in choices)
        return f"{ASKED.format(subject)}{row['question']}{lines}\nAnswer: "

    def target_of(row: Any) -> str:
        return LETTERS[row["answer"]]

    def score(row: Any, answers: Sequence[str]) -> dict[str, float]:
        return {"acc": float(chosen_letter(answers[0]) == LETTERS[row["answer"]])}

    return {
        "description": None,
        "output_type": "generate_until",
        "doc_to_text": text_of,
        "doc_to_target": target_of,
        "doc_to_choice": None,
        "target_delimiter": "\n",
        "fewshot_delimiter": "\n\n",
        "process_results": score,
        "metric_list": [_mean("acc")],
        "generation_kwargs": {"until": [f"\n\n{ASKED.split('{')[0]}"], "do_sample": False},
    }


def _of_programs(on_program: OnProgram) -> dict[str, Any]:
    """What is otherwise where a program is written: lm-eval's own metric comes from the hub."""

    def score(row: Any, answers: Sequence[str]) -> dict[str, float]:
        return dict(on_program(row, answers[0]))

    return {
        "metric_list": [_mean(name) for name in ("is_python", "pass@1")],
        "process_results": score,
        "filter_list": None,
        "unsafe_code": None,
    }


def _mean(name: str) -> dict[str, Any]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


# --- lm-eval's files ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Function:
    """A function that a definition names; it is imported only where it is used."""

    folder: Path
    name: str

    def load(self) -> Any:
        module_name, _, function = self.name.rpartition(".")
        path = self.folder / f"{module_name}.py"
        spec = importlib.util.spec_from_file_location(f"lm_eval_{path.parent.name}", path)
        assert spec is not None and spec.loader is not None, path
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, function)


def _read(path: Path) -> dict[str, Any]:
    """A definition with what it includes."""

    class Loader(yaml.SafeLoader):
        pass

    def function(loader: yaml.SafeLoader, node: Any) -> _Function:
        return _Function(path.parent, str(loader.construct_scalar(node)))

    Loader.add_constructor("!function", function)
    config = yaml.load(read_text(path), Loader)
    included = config.get("include")
    return config if included is None else {**_read(path.parent / included), **config}


def _resolved(value: Any) -> Any:
    """A part of a definition with its functions imported."""
    if isinstance(value, _Function):
        return value.load()
    if isinstance(value, dict):
        return {key: _resolved(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_resolved(part) for part in value]
    return value
