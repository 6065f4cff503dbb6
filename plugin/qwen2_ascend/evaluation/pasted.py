"""What MindSpeed-LLM's flags of evaluation mean; pasted_flags.py is the mechanism."""

from __future__ import annotations

from typing import Any

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.inference.pasted import SERVED_FLAGS
from qwen2_ascend.pasted_flags import Meaning, Table


def _is_the_tasks(value: str | None, settings: Any, config: Qwen2Config) -> str | None:
    if settings.local.task:
        return None
    return "it belongs to --task; leave it out, the tasks of --tasks have prompts of their own"


EVALUATE_FLAGS: Table = {
    **SERVED_FLAGS,
    "--greedy": Meaning("tasks say how tokens are chosen; those of --task take the likeliest"),
    "--broadcast": Meaning("every rank reads the questions"),
    "--eval-language": Meaning(
        "the task's definition has its language", ("en", "zh"), check=_is_the_tasks
    ),
    "--origin-postprocess": Meaning(
        "an answer in words is read in one way only; leave it out", refused=True
    ),
    "--instruction-template": Meaning(
        "write a task with that prompt, and name its folder with --include-path", None, refused=True
    ),
    "--hf-chat-template": Meaning("say --apply-chat-template", refused=True),
}
"""The pasted flags of launch/evaluate_qwen2.py."""
