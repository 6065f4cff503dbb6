"""Runs of lm-eval over this project's model, and their results as rows of a table."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from qwen2_ascend.errors import UserError
from qwen2_ascend.evaluation.lm_eval_adapter import Qwen2LM
from qwen2_ascend.evaluation.local_run import LocalTasks
from qwen2_ascend.evaluation.settings import EvaluateSettings, TaskSettings
from qwen2_ascend.evaluation.table import Rows
from qwen2_ascend.inference.engine import Engine
from qwen2_ascend.inference.generation_config import Defaults
from qwen2_ascend.inference.tokenizer import Tokenizer


def run_all(
    settings: EvaluateSettings,
    engine: Engine,
    tokenizer: Tokenizer,
    defaults: Defaults,
    local: LocalTasks | None,
) -> tuple[Rows, dict[str, Any]]:
    """Rows for the table, and lm-eval's own results; nothing but on the first rank of a node."""
    run = partial(_run, settings, engine, tokenizer, defaults)
    rows: Rows = []
    details: dict[str, Any] = {}
    if settings.lm_eval.tasks:
        rows, details = run(**_named_tasks(settings.lm_eval))
    if local is not None:
        more, found = run(**local.options())
        rows += local.finished(more)
        details = {name: {**details.get(name, {}), **found[name]} for name in found} or details
    return rows, details


def _named_tasks(wanted: TaskSettings) -> dict[str, Any]:
    """The tasks of --tasks, as lm-eval's `simple_evaluate` takes them."""
    include = None if wanted.include_path is None else str(wanted.include_path)
    manager = TaskManager(include_path=include)
    if unknown := [name for name in wanted.tasks if name not in manager.all_tasks]:
        raise UserError(
            f"--tasks {' '.join(unknown)}: lm-eval has no such task; its own are listed by "
            "`lm-eval ls tasks`, yours are found with --include-path."
        )
    return {
        "tasks": list(wanted.tasks),
        "task_manager": manager,
        "apply_chat_template": wanted.apply_chat_template,
    }


def _run(
    settings: EvaluateSettings,
    engine: Engine,
    tokenizer: Tokenizer,
    defaults: Defaults,
    **options: Any,
) -> tuple[Rows, dict[str, Any]]:
    results: Any = simple_evaluate(
        model=Qwen2LM(engine, tokenizer, defaults, seed=settings.seed),
        num_fewshot=settings.lm_eval.num_fewshot,
        limit=settings.lm_eval.limit,
        system_instruction=settings.lm_eval.system_prompt,
        log_samples=False,
        bootstrap_iters=0,
        **options,
    )
    if results is None:  # lm-eval looks at LOCAL_RANK
        return [], {}
    kept = ("results", "configs", "versions", "n-shot", "n-samples")
    return list(_rows_of(results)), {name: results[name] for name in kept if name in results}


def _rows_of(results: Any) -> Iterator[dict[str, Any]]:
    for task, metrics in results["results"].items():
        samples = results.get("n-samples", {}).get(task, {}).get("effective")
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and "_stderr" not in name and "," in name:
                metric, _, kind = name.partition(",")
                error = metrics.get(f"{metric}_stderr,{kind}")
                yield {
                    "task": task,
                    "metric": metric if kind == "none" else name,
                    "value": float(value),
                    "stderr": error if isinstance(error, float) else None,
                    "samples": samples,
                }
