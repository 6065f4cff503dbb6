"""What lm-eval's own `hf` model, which is transformers, finds, and what the launcher has found."""

from __future__ import annotations

import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed (the extra 'eval')"
)


def metrics(path: Path) -> dict[tuple[str, str], float]:
    """(task, metric) to value, of a file of --output-json."""
    rows = json.loads(path.read_text(encoding="utf-8"))["results"]
    return {(row["task"], row["metric"]): row["value"] for row in rows}


def by_hf_model(
    folder: Path, tasks: list[Any], *, in_turns: bool = False, **manager: Any
) -> dict[tuple[str, str], float]:
    """(task, metric) to value, of tasks or their names; `manager` says where these are.

    With `in_turns` examples and questions are turns of the tokenizer's chat template.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: Any = simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder), "dtype": "float32"},
            device="cpu",
            batch_size=1,
            tasks=tasks,
            task_manager=TaskManager(**manager),
            apply_chat_template=in_turns,
            fewshot_as_multiturn=in_turns,
            bootstrap_iters=0,
        )
    return {
        (task, name.removesuffix(",none")): value
        for task, values in found["results"].items()
        for name, value in values.items()
        if "," in name and "_stderr" not in name
    }
