"""Evaluation from the command line to the exit status: what `launch/evaluate_qwen2.py` runs.

The log goes to stderr, the table to stdout.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2_ascend import markdown
from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.evaluation.settings import EvaluateSettings, parse, validate
from qwen2_ascend.inference.opening import (
    config_folder,
    open_model,
    start_engine,
    open_tokenizer,
)
from qwen2_ascend.launching import launched
from qwen2_ascend.vocabulary import unknown_tokens

if TYPE_CHECKING:
    from qwen2_ascend.inference.engine import Engine
    from qwen2_ascend.inference.generation_config import Defaults

Rows = list[dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `launch/evaluate_qwen2.py`; gives its exit status."""
    return launched(lambda: evaluate(parse(arguments)))


def evaluate(settings: EvaluateSettings) -> None:
    """Evaluates as `settings` say, as one rank of torchrun's or as a process alone.

    Raises:
        UserError: settings, texts or checkpoint are not as they have to be.
    """
    source = open_model(settings.model).source
    validate(settings, source.config, int(os.environ.get("WORLD_SIZE", "1")))
    if settings.lm_eval.tasks and find_spec("lm_eval") is None:
        raise UserError("--tasks needs lm-eval; install it with: pip install 'qwen2-ascend[eval]'.")

    from qwen2_ascend.inference.generation_config import Defaults

    tokenizer = open_tokenizer(settings.model, source)
    defaults = Defaults(config_folder(source))
    if settings.lm_eval.tasks and tokenizer.eos_token is None and not defaults.eos_tokens:
        raise UserError(
            f"{config_folder(source)}: neither the tokenizer nor generation_config.json nor "
            "config.json has an end of text (eos_token_id), which --tasks needs."
        )
    texts = _read_texts(settings.perplexity.text_file, tokenizer, source.config.vocab_size)
    runtime, engine, say = start_engine(settings.model, source, num_rows=settings.batch_size)
    rows = _perplexities(settings, engine, texts)
    details: dict[str, Any] = {}
    if settings.lm_eval.tasks:
        task_rows, details = _tasks(settings, engine, tokenizer, defaults)
        rows += task_rows
    if runtime.rank == 0:
        print(table(rows), flush=True)
        if settings.output_json is not None:
            results = {"model": str(settings.model.load), "results": rows, "lm_eval": details}
            _write(settings.output_json, results)
            say(f"wrote {settings.output_json}")
    runtime.close()


def table(rows: Rows) -> str:
    """Results as a Markdown table."""
    head = ("task", "metric", "value", "stderr", "samples")
    return markdown.table(head, ([_cell(row.get(name)) for name in head] for row in rows))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _read_texts(
    paths: Sequence[Path], tokenizer: Tokenizer, vocab_size: int
) -> list[tuple[Path, list[int], int]]:
    """(file, its tokens, its bytes)."""
    texts, faults = [], []
    for path in paths:
        try:
            raw = path.read_bytes()
            tokens = tokenizer.encode(raw.decode("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            faults.append(f"--text-file {path}: cannot be read as UTF-8 text: {error}")
            continue
        if len(tokens) < 2:
            faults.append(f"--text-file {path}: has {len(tokens)} token(s); two are the least.")
        if unknown := unknown_tokens(tokens, vocab_size):
            faults.append(f"--text-file {path}: {unknown}")
        texts.append((path, tokens, len(raw)))
    raise_if(faults)
    return texts


def _perplexities(
    settings: EvaluateSettings, engine: Engine, texts: Sequence[tuple[Path, list[int], int]]
) -> Rows:
    from qwen2_ascend.evaluation.perplexity import perplexity
    from qwen2_ascend.evaluation.scoring import Scorer

    window, stride = settings.window(engine.config), settings.stride(engine.config)
    rows: Rows = []
    for path, tokens, num_bytes in texts:
        found = asdict(
            perplexity(Scorer(engine), tokens, num_bytes=num_bytes, window=window, stride=stride)
        )
        samples = found.pop("num_tokens")
        rows += [
            {
                "task": path.name,
                "metric": name,
                "value": value,
                "samples": samples,
                "window": window,
                "stride": stride,
            }
            for name, value in found.items()
        ]
    return rows


def _tasks(
    settings: EvaluateSettings, engine: Engine, tokenizer: Tokenizer, defaults: Defaults
) -> tuple[Rows, dict[str, Any]]:
    """Rows for the table, and lm-eval's own results; nothing but on the first rank of a node."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from qwen2_ascend.evaluation.lm_eval_adapter import Qwen2LM

    wanted = settings.lm_eval
    include = None if wanted.include_path is None else str(wanted.include_path)
    manager = TaskManager(include_path=include)
    if unknown := [name for name in wanted.tasks if name not in manager.all_tasks]:
        raise UserError(
            f"--tasks {' '.join(unknown)}: lm-eval has no such task; its own are listed by "
            "`lm-eval ls tasks`, yours are found with --include-path."
        )
    results: Any = simple_evaluate(
        model=Qwen2LM(engine, tokenizer, defaults),
        tasks=list(wanted.tasks),
        task_manager=manager,
        num_fewshot=wanted.num_fewshot,
        limit=wanted.limit,
        apply_chat_template=wanted.apply_chat_template,
        system_instruction=wanted.system_prompt,
        log_samples=False,
        bootstrap_iters=0,
    )
    if results is None:  # lm-eval looks at LOCAL_RANK
        return [], {}
    rows: Rows = []
    for task, metrics in results["results"].items():
        samples = results.get("n-samples", {}).get(task, {}).get("effective")
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and "_stderr" not in name and "," in name:
                metric, _, kind = name.partition(",")
                error = metrics.get(f"{metric}_stderr,{kind}")
                error = error if isinstance(error, float) else None
                rows.append(
                    {
                        "task": task,
                        "metric": metric if kind == "none" else name,
                        "value": float(value),
                        "stderr": error,
                        "samples": samples,
                    }
                )
    kept = ("results", "configs", "versions", "n-shot", "n-samples")
    return rows, {name: results[name] for name in kept if name in results}


def _write(path: Path, results: dict[str, Any]) -> None:
    """All of it or nothing."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8")
    part.replace(path)
