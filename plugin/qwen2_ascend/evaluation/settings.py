"""EvaluateSettings: every flag of `launch/evaluate_qwen2.py`, and the rules between them.

Nothing here imports torch, so `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import raise_if
from qwen2_ascend.files import missing
from qwen2_ascend.inference.settings import Flag, ServedModelSettings
from qwen2_ascend.launching import parse_flags


@dataclass(frozen=True, kw_only=True)
class PerplexitySettings:
    """Perplexity of texts, by windows that slide over each."""

    text_file: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE ...")] = ()
    """Plain text files."""
    window: int | None = None
    """Tokens in a window; by default 2048, or the model's context where that is shorter."""
    stride: int | None = None
    """Tokens by which the window slides; by default half a window. A token is scored once, with at
    least window - stride tokens before it; smaller is slower and gives lower perplexities."""


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """Tasks of lm-eval (pip install 'qwen2-ascend[eval]')."""

    tasks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Names of tasks."""
    include_path: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder with task definitions (YAML) of your own."""
    num_fewshot: int | None = None
    """Examples in front of each question; by default what the task says."""
    limit: int | None = None
    """Questions of each task; by default all. For trying out: such results are no results."""
    apply_chat_template: Flag = False
    """Ask through the tokenizer's chat template."""
    system_prompt: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """The system's message; with --apply-chat-template."""


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Evaluate Qwen2 / Qwen2.5, one process per device.

    python launch/evaluate_qwen2.py --load out/hf --text-file book.txt --output-json results.json
    """

    model: ServedModelSettings
    perplexity: PerplexitySettings = field(default_factory=PerplexitySettings)
    lm_eval: TaskSettings = field(default_factory=TaskSettings)
    batch_size: int = 4
    """Sequences that are scored at once."""
    output_json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the results there."""

    def window(self, config: Qwen2Config) -> int:
        """Tokens in a window."""
        given = self.perplexity.window
        return min(2048, config.max_position_embeddings) if given is None else given

    def stride(self, config: Qwen2Config) -> int:
        """Tokens by which it slides."""
        given = self.perplexity.stride
        return max(1, self.window(config) // 2) if given is None else given


def parse(arguments: Sequence[str] | None = None) -> EvaluateSettings:
    """The command line; on a fault it prints and exits with 2, printing on rank 0 only."""
    return parse_flags(EvaluateSettings, "evaluate_qwen2.py", arguments)


def validate(settings: EvaluateSettings, config: Qwen2Config, world_size: int) -> None:
    """Checks all that can be checked before any process group exists.

    Raises:
        UserError: all faults at once.
    """
    faults = settings.model.faults(config, world_size)
    files, tasks = settings.perplexity.text_file, settings.lm_eval
    if not files and not tasks.tasks:
        faults.append("give --text-file, --tasks or both.")
    faults += [f"--text-file {path}: {missing(path)}." for path in files if not path.is_file()]
    window, context = settings.window(config), config.max_position_embeddings
    if not 2 <= window <= context:
        faults.append(
            f"--window {window} must be from 2 to the model's context (max_position_embeddings), "
            f"{context}."
        )
    elif not 1 <= settings.stride(config) < window:
        faults.append(
            f"--stride {settings.stride(config)} must be from 1 to {window - 1}, one below "
            "--window."
        )
    at_least_one = {"--batch-size": settings.batch_size, "--limit": tasks.limit}
    faults += [
        f"{k} {v} must be at least 1." for k, v in at_least_one.items() if v is not None and v < 1
    ]
    if tasks.num_fewshot is not None and tasks.num_fewshot < 0:
        faults.append(f"--num-fewshot {tasks.num_fewshot} must not be below zero.")
    if tasks.include_path is not None and not tasks.include_path.is_dir():
        faults.append(f"--include-path {tasks.include_path}: no such folder.")
    output = settings.output_json
    if output is not None and not output.parent.is_dir():
        faults.append(f"--output-json {output}: there is no folder {output.parent}.")
    raise_if(dict.fromkeys(faults))
