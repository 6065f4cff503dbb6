"""An evaluation from its settings to the table.

megatron-core is imported once the engine has been started; lm-eval is an extra.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.evaluation.pasted import EVALUATE_FLAGS
from qwen2_ascend.evaluation.settings import EvaluateSettings, validate
from qwen2_ascend.evaluation.table import table
from qwen2_ascend.files import write_file
from qwen2_ascend.inference.generation_config import Defaults
from qwen2_ascend.inference.opening import config_folder, open_model, open_tokenizer, start_engine
from qwen2_ascend.inference.tokenizer import Tokenizer
from qwen2_ascend.machine import world_size
from qwen2_ascend.vocabulary import unknown_tokens

logger = logging.getLogger(__name__)


def evaluate(settings: EvaluateSettings) -> None:
    """Evaluates as `settings` say, as one rank of torchrun's or as a process alone.

    Raises:
        UserError: settings, texts or checkpoint are not as they have to be.
    """
    opened = open_model(settings.model)
    source = opened.source
    validate(settings, source.config, world_size())
    _require_lm_eval(settings)

    tokenizer = open_tokenizer(settings.model, source)
    defaults = Defaults(config_folder(source))
    _require_end_of_text(settings, config_folder(source), tokenizer, defaults)
    texts = _read_texts(settings.perplexity.text_file, tokenizer, source.config.vocab_size)
    local = None
    if settings.local.task:
        from qwen2_ascend.evaluation.local_run import LocalTasks

        local = LocalTasks(settings, tokenizer)
    runtime, engine = start_engine(settings.model, opened, num_rows=settings.batch_size)
    notes = settings.model.notes(settings.pasted, EVALUATE_FLAGS, source.config)
    for line in (*notes, *(local.describe() if local else ())):
        logger.info(line)

    from qwen2_ascend.evaluation.perplexity import perplexities  # with megatron-core

    rows = perplexities(settings, engine, texts)
    details: dict[str, Any] = {}
    if _lm_eval_flag(settings):
        from qwen2_ascend.evaluation.lm_eval_run import run_all

        task_rows, details = run_all(settings, engine, tokenizer, defaults, local)
        rows += task_rows
    if runtime.rank == 0:
        print(table(rows), flush=True)
        if settings.output_json is not None:
            results = {"model": str(settings.model.load), "results": rows, "lm_eval": details}
            text = json.dumps(results, indent=1, default=str) + "\n"
            write_file(settings.output_json, text.encode())
            logger.info(f"wrote {settings.output_json}")
    runtime.close()


def _lm_eval_flag(settings: EvaluateSettings) -> str | None:
    """The flag that asks for lm-eval."""
    given = {"--tasks": settings.lm_eval.tasks, "--task": settings.local.task}
    return next((flag for flag, names in given.items() if names), None)


def _require_lm_eval(settings: EvaluateSettings) -> None:
    if (flag := _lm_eval_flag(settings)) and find_spec("lm_eval") is None:
        raise UserError(f"{flag} needs lm-eval; install it with: pip install 'qwen2-ascend[eval]'.")


def _require_end_of_text(
    settings: EvaluateSettings, folder: Path, tokenizer: Tokenizer, defaults: Defaults
) -> None:
    flag = _lm_eval_flag(settings)
    if flag and tokenizer.eos_token is None and not defaults.eos_tokens:
        raise UserError(
            f"{folder}: neither the tokenizer nor generation_config.json nor config.json has an "
            f"end of text (eos_token_id), which {flag} needs."
        )


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
