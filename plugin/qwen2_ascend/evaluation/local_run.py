"""--task: benchmarks of local files, from the flags to the rows of a table."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from qwen2_ascend.evaluation.benchmarks import Benchmark, read_benchmark
from qwen2_ascend.evaluation.local_tasks import local_tasks
from qwen2_ascend.evaluation.programs import Programs
from qwen2_ascend.evaluation.settings import EvaluateSettings
from qwen2_ascend.evaluation.table import Rows
from qwen2_ascend.inference.tokenizer import Tokenizer
from qwen2_ascend.machine import rank


class LocalTasks:
    """The benchmarks of local files, read and checked before any process waits for another.

    Raises:
        UserError: files that are missing or hold something else.
    """

    def __init__(self, settings: EvaluateSettings, tokenizer: Tokenizer) -> None:
        local, self._settings = settings.local, settings
        self._programs = Programs(_programs_file(settings), is_first=rank() == 0)
        examples = settings.lm_eval.num_fewshot
        self._benchmarks = [read_benchmark(name, path, examples) for name, path in local.named]
        self._tasks = {
            one.name: local_tasks(one, local, self._programs) for one in self._benchmarks
        }
        self._has_template = not local.no_chat_template and bool(tokenizer.template())

    def describe(self) -> Iterator[str]:
        """Lines for the log."""
        yield from (benchmark.describe() for benchmark in self._benchmarks)
        yield f"questions are asked {'by a chat template' if self._has_template else 'as they are'}"
        if any(one.name == "human_eval" for one in self._benchmarks):
            yield self._programs.describe()
        is_generated = {one.config.output_type for all_ in self._tasks.values() for one in all_}
        if "multiple_choice" in is_generated and self._settings.local.max_new_tokens is not None:
            yield "--max-new-tokens: choices are scored, nothing is generated"

    def options(self) -> dict[str, Any]:
        """The benchmarks as lm-eval's `simple_evaluate` takes them."""
        return {
            "tasks": [task for tasks in self._tasks.values() for task in tasks],
            "task_manager": TaskManager(include_defaults=False),
            "apply_chat_template": self._has_template,
            # turns of a prompt type are examples; else one question has them all in it
            "fewshot_as_multiturn": self._settings.model.prompt_type is not None,
        }

    def finished(self, rows: Rows) -> Rows:
        """The rows with those of whole benchmarks; the model's programs are written."""
        if "human_eval" in self._tasks:
            self._programs.write()
        if rows:
            rows += [row for one in self._benchmarks for row in self._totals(one, rows)]
        return rows

    def _totals(self, benchmark: Benchmark, rows: Rows) -> Rows:
        """A benchmark's metrics over all of its files; each question counts once."""
        names = [task.config.task for task in self._tasks[benchmark.name]]
        if len(names) < 2:
            return []
        own = [row for row in rows if row["task"] in names]
        totals = []
        for metric in dict.fromkeys(row["metric"] for row in own):
            of_it = [row for row in own if row["metric"] == metric]
            samples = sum(row["samples"] for row in of_it)
            value = sum(row["value"] * row["samples"] for row in of_it) / samples
            total = {"task": benchmark.name, "metric": metric, "value": value, "stderr": None}
            totals.append({**total, "samples": samples})
        return totals


def _programs_file(settings: EvaluateSettings) -> Path:
    """Where a model's programs are written: beside the results, or here, over nothing."""
    output = settings.output_json
    if output is not None:
        return output.with_name(f"{output.stem}_human_eval.jsonl")
    names = (f"human_eval{f'_{i}' if i else ''}.jsonl" for i in itertools.count())
    return next(path for name in names if not (path := Path(name)).exists())
