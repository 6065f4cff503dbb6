"""The Plan page: a form becomes the planner's question, its answer a table, a row a command."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from qwen2_ascend.board import scheduling
from qwen2_ascend.board.forms import choice, whole
from qwen2_ascend.board.jail import Jail
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError
from qwen2_ascend.planning import report
from qwen2_ascend.planning.command import PlanOptions, plan
from qwen2_ascend.planning.devices import ALIASES, DEVICES
from qwen2_ascend.planning.search import Plan

SIZES = ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")
METHODS = ("pretrain", "sft", "lora")
PLACES = ("node", "slurm", "volcano")
DEVICE_NAMES = (*ALIASES, *DEVICES)
MAX_ROWS = 40
MAX_DEVICES = 16_384
KINDS = ("weights", "gradients", "optimizer", "activations", "temporary", "logits", "buffers")
"""The kinds of memory, in the order in which a bar stacks them."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be planned."""

    options: PlanOptions
    method: str
    """One of METHODS."""


def question(form: Mapping[str, Any], jail: Jail) -> Question:
    """The question that a form asks.

    Raises:
        UserError: a value that cannot be.
    """
    method = choice(form, "method", METHODS)
    lora = whole(form, "lora_r", 1, 4096) if method == "lora" else None
    return Question(
        method=method,
        options=PlanOptions(
            model=_model(str(form.get("model") or ""), jail),
            device=choice(form, "device", DEVICE_NAMES),
            num_devices=whole(form, "num_devices", 1, MAX_DEVICES),
            seq_length=whole(form, "seq_length", 1, 1 << 24),
            global_batch_size=whole(form, "global_batch_size", 1, 1 << 24),
            lora_r=lora,
            dtype=choice(form, "dtype", ("bf16", "fp16", "fp32")),  # type: ignore[arg-type]
        ),
    )


def _model(name: str, jail: Jail) -> str:
    """A published size, or a folder of the board's."""
    if name in SIZES:
        return name
    if not name:
        raise UserError(f"model: give a folder, or one of {', '.join(SIZES)}.")
    path = jail.existing(name)
    if not str(path).isprintable():
        raise UserError(f"{name}: its path has characters that no command line should have.")
    Qwen2Config.from_pretrained(path)
    return str(path)


def answer(asked: Question) -> dict[str, Any]:
    """The planner's table for the page; bytes and seconds.

    Raises:
        UserError: there is no layout, or no such model.
    """
    result = _planned(asked)
    return {
        "answer": [_named(one) for one in report.said(result)],
        "notes": [_named(one) for one in report.notes(result)],
        "usable_memory": result.machine.usable_memory,
        "device_memory": result.machine.device.memory,
        "kinds": KINDS,
        "rows": [_row(one) for one in _shown(result)],
    }


def _shown(result: report.Result) -> list[Plan]:
    return report.best_of_each_shape(result.plans)[:MAX_ROWS]


def _named(text: Any) -> Any:
    """A text by its name, so that the page says it in its language."""
    if isinstance(text, report.Listed):
        return [_named(one) for one in text]
    if not isinstance(text, report.Said):
        return text
    return {"key": text.key, "values": {name: _named(one) for name, one in text.values.items()}}


def _planned(asked: Question) -> report.Result:
    """The planner's answer; the same question again is answered from memory."""
    path = Path(str(asked.options.model))
    config = path / "config.json" if path.is_dir() else path
    changed = config.stat().st_mtime_ns if config.exists() else 0
    return _kept(asked.options, changed)


@lru_cache(maxsize=4)
def _kept(options: PlanOptions, changed: int) -> report.Result:
    return plan(options)


def _row(one: Plan) -> dict[str, Any]:
    fields = report.as_dict(one)
    rate = one.cut.job.tokens_per_step / one.time.total / one.cut.num_devices
    memory = {kind: getattr(one.memory, kind) for kind in KINDS}
    return fields | {
        "label": one.cut.label(),
        "parts": memory,
        "tokens_per_second_per_device": rate,
        "verdict": "fits" if one.has_headroom else "tight" if one.fits else "no",
    }


def command(asked: Question, row: int, place: str) -> str:
    """The launch command of a row of the table.

    Args:
        asked: what the table answers.
        row: its number in the table, from 0.
        place: one of PLACES.

    Raises:
        UserError: there is no such row.
    """
    result = _planned(asked)
    shown = _shown(result)
    if not 0 <= row < len(shown):
        raise UserError(f"the table has no row {row}.")
    cut, machine = shown[row].cut, result.machine
    nodes = -(-cut.num_devices // machine.devices_per_node)
    launch = scheduling.Launch(
        script=f"launch/{'pretrain' if asked.method == 'pretrain' else 'finetune'}_qwen2.py",
        flags=tuple(_flags(asked, result.model, cut)),
        num_nodes=nodes,
        devices_per_node=-(-cut.num_devices // nodes),
        device=cut.job.backend,
    )
    return getattr(scheduling, place)(launch)


def _flags(asked: Question, model: str, cut: Any) -> list[str]:
    """The planner's flags; for fine-tuning all weights with a model and chats."""
    flags = report.launch_flags(model, cut)
    if asked.method != "sft":
        return flags
    if not Path(model).exists():
        model = f"Qwen2.5-{model}-Instruct"
    elif os.path.isfile(model):
        model = os.path.dirname(model)
    replaced = ("--config ", "--mock-data")
    rest = [flag for flag in flags if not flag.startswith(replaced)]
    return [f"--load {shlex.quote(model)}", "--data-path CHATS.jsonl", *rest]
