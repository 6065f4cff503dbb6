"""human_eval: what is made of a model's continuations of functions.

They are written to a file in the form of the benchmark's own tool, {"task_id", "completion"} on
each line, and run against the benchmark's tests where the user has said that they may.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen2_ascend.evaluation.code_runs import PERMISSION, is_python, may_run, passes
from qwen2_ascend.files import write_file


class Programs:
    """Takes a model's continuations one by one.

    Args:
        path: the file to write them to, whose folder is there.
        is_first: whether this rank writes and runs; the others have no results.
    """

    def __init__(self, path: Path, *, is_first: bool) -> None:
        self._path = path
        self._is_first = is_first
        self._runs = may_run()
        self._lines: list[str] = []

    def describe(self) -> str:
        """One line for the log."""
        written = (
            "human_eval: lm-eval's prompt, decoded greedily (MindSpeed-LLM puts a sentence in "
            f"front and takes 4 beams); continuations are written to {self._path}"
        )
        if self._runs:
            return f"{written}, and run, because {PERMISSION}=1"
        return (
            f"{written} and not run, so there is no pass@1: code of a model can do harm. To "
            f"run it, set {PERMISSION}=1 in the environment, on a machine that has nothing to lose"
        )

    def __call__(self, question: Mapping[str, Any], continuation: str) -> dict[str, float]:
        """The metrics of a continuation."""
        if not self._is_first:
            return {"is_python": 0.0}
        row = {"task_id": question["task_id"], "completion": continuation}
        self._lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        program = question["prompt"] + continuation
        found = {"is_python": float(is_python(program))}
        if self._runs:
            test = f"{program}\n{question['test']}\ncheck({question['entry_point']})"
            found["pass@1"] = float(passes(test))
        return found

    def write(self) -> None:
        """Writes them, all of them or nothing; on the first rank only."""
        if self._is_first:
            write_file(self._path, "".join(self._lines).encode())
