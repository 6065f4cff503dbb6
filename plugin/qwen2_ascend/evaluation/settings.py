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
from qwen2_ascend.evaluation.benchmarks import KINDS
from qwen2_ascend.evaluation.pasted import EVALUATE_FLAGS
from qwen2_ascend.files import missing, output_faults
from qwen2_ascend.flags import Flag, given_flags, number_faults
from qwen2_ascend.inference.settings import ServedModelSettings
from qwen2_ascend.launching import parse_pasted
from qwen2_ascend.pasted_flags import Pasted, pasted_faults


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
    limit: Annotated[int | None, tyro.conf.arg(aliases=["--max-eval-samples"])] = None
    """Questions of each task; by default all. For trying out: such results are no results."""
    apply_chat_template: Flag = False
    """Ask through the tokenizer's chat template."""
    system_prompt: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """The system's message; with --apply-chat-template."""


SAME_TASKS = {"mmlu_ppl": "mmlu"}
"""Names of MindSpeed-LLM's for what lm-eval does anyway: it scores the letters of the choices."""


@dataclass(frozen=True, kw_only=True)
class LocalTaskSettings:
    """Benchmarks from the files that MindSpeed-LLM's users have, by lm-eval's tasks."""

    task: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """mmlu, cmmlu, ceval, boolq, gsm8k, bbh, agieval or human_eval."""
    task_data_path: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="DIR ...")] = ()
    """The folder of the questions, one for each --task; mmlu's is data/test of its archive."""
    max_new_tokens: int | None = None
    """Tokens of an answer at most, where one is generated; mmlu, cmmlu, ceval, boolq and the
    choices of agieval are scored, so nothing is generated."""
    no_chat_template: Flag = False
    """With --task: ask without the tokenizer's chat template, which is used where there is one."""
    alternative_prompt: Flag = False
    """With --task mmlu: ask for an answer in words, which is searched for the letter."""
    chain_of_thought: Flag = False
    """With --task bbh: examples that think before they answer."""

    @property
    def named(self) -> list[tuple[str, Path]]:
        """(benchmark, folder) of each task."""
        tasks = [SAME_TASKS.get(name, name) for name in self.task]
        return list(zip(tasks, self.task_data_path, strict=True))


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Evaluate Qwen2 / Qwen2.5, one process per device.

    python launch/evaluate_qwen2.py --load out/hf --text-file book.txt --output-json results.json
    """

    model: ServedModelSettings
    perplexity: PerplexitySettings = field(default_factory=PerplexitySettings)
    lm_eval: TaskSettings = field(default_factory=TaskSettings)
    local: LocalTaskSettings = field(default_factory=LocalTaskSettings)
    batch_size: Annotated[int, tyro.conf.arg(aliases=["--evaluation-batch-size"])] = 4
    """Sequences that are scored at once."""
    seed: int = 1234
    """Seed of the draws, where a task draws tokens; those of --task do not."""
    output_json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the results there."""
    pasted: tyro.conf.Fixed[tyro.conf.Suppress[Pasted]] = ()
    """Flags of others' scripts beside these."""

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
    return parse_pasted(EvaluateSettings, "evaluate_qwen2.py", arguments, EVALUATE_FLAGS)


def validate(settings: EvaluateSettings, config: Qwen2Config, world_size: int) -> None:
    """Checks all that can be checked before any process group exists.

    Raises:
        UserError: all faults at once.
    """
    faults = settings.model.faults(config, world_size)
    files, tasks = settings.perplexity.text_file, settings.lm_eval
    if not files and not tasks.tasks and not settings.local.task:
        faults.append("give --text-file, --tasks or --task.")
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
    faults += number_faults(settings, at_least_one=("batch_size",))
    faults += number_faults(tasks, at_least_one=("limit",), not_negative=("num_fewshot",))
    if not 0 <= settings.seed < 2**63:
        faults.append(f"--seed {settings.seed} must be from 0 to below 2^63.")
    if tasks.include_path is not None and not tasks.include_path.is_dir():
        faults.append(f"--include-path {tasks.include_path}: no such folder.")
    faults += _idle_faults(settings)
    faults += output_faults("--output-json", settings.output_json, is_renamed=True)
    faults += _local_faults(settings)
    faults += pasted_faults(settings.pasted, EVALUATE_FLAGS, settings, config)
    raise_if(dict.fromkeys(faults))


def _idle_faults(settings: EvaluateSettings) -> list[str]:
    """Flags of an evaluation that is not asked for, beside another that is."""
    texts, named = settings.perplexity, settings.lm_eval
    has_texts, has_tasks = bool(texts.text_file), bool(named.tasks or settings.local.task)
    idle: dict[str, list[str]] = {}
    if has_tasks and not has_texts:
        idle["--text-file"] = given_flags(texts, ("window", "stride"))
    if has_texts and not has_tasks:
        questions = ("apply_chat_template", "system_prompt", "num_fewshot", "limit")
        idle["--tasks and --task"] = given_flags(named, questions)
    if (has_texts or has_tasks) and not named.tasks:
        idle["--tasks"] = given_flags(named, ("include_path",))
    return [
        f"{flag} is for {what}; leave it out." for what, flags in idle.items() for flag in flags
    ]


def _local_faults(settings: EvaluateSettings) -> list[str]:
    """What is wrong with --task and what belongs to it."""
    local, faults = settings.local, []
    known = {*KINDS, *SAME_TASKS}
    faults += [
        f"--task {name}: there is no such benchmark; there are {', '.join(KINDS)}. lm-eval's own "
        "tasks are for --tasks."
        for name in local.task
        if name not in known
    ]
    if len(local.task) != len(local.task_data_path):
        faults.append(
            f"{len(local.task)} --task and {len(local.task_data_path)} --task-data-path; give one "
            "folder for each task."
        )
    if len({SAME_TASKS.get(name, name) for name in local.task}) < len(local.task):
        faults.append(f"--task {' '.join(local.task)}: asks for the same twice; name it once.")
    faults += number_faults(local, at_least_one=("max_new_tokens",))
    for flag, is_on, task in (
        ("--alternative-prompt", local.alternative_prompt, "mmlu"),
        ("--chain-of-thought", local.chain_of_thought, "bbh"),
    ):
        if is_on and set(local.task) != {task}:
            faults.append(f"{flag} is for --task {task} alone; leave it out.")
    if not local.task:
        only = {
            "--max-new-tokens": local.max_new_tokens,
            "--no-chat-template": local.no_chat_template,
        }
        faults += [f"{flag} is for --task; leave it out." for flag, value in only.items() if value]
    return faults + _template_faults(settings)


def _template_faults(settings: EvaluateSettings) -> list[str]:
    local, tasks, prompt_type = settings.local, settings.lm_eval, settings.model.prompt_type
    faults = []
    if prompt_type is not None and not (local.task or tasks.apply_chat_template):
        faults.append("--prompt-type needs --task or --apply-chat-template.")
    if local.no_chat_template and (tasks.apply_chat_template or prompt_type is not None):
        faults.append(
            "--no-chat-template goes neither with --apply-chat-template nor with --prompt-type; "
            "leave one out."
        )
    return faults
