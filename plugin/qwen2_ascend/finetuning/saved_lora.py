"""What a checkpoint of a LoRA run says, read before torch and megatron-core are imported.

    SAVE/iter_0000100/adapter_config.json, adapter_model.safetensors     a PEFT adapter as it is
    SAVE/iter_0000100/{exp_avg,exp_avg_sq,fp32_param}.safetensors        the optimizer, in its form
    SAVE/iter_0000100/rng_TT_PPP.pt, rng_RRRRR.pt by ZeRO                random number generators
    SAVE/iter_0000100/run.json                                           progress and schedule
    SAVE/latest_checkpointed_iteration.txt                               written last, by rename

The base model is not in it: it does not change.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2_ascend.checkpoint.formats import megatron
from qwen2_ascend.checkpoint.formats.peft_adapter import CONFIG_FILE, read_lora_config
from qwen2_ascend.errors import UserError
from qwen2_ascend.files import read_bytes
from qwen2_ascend.lora_config import LoraConfig

RUN_FILE = "run.json"


@dataclass(frozen=True, kw_only=True)
class SavedLora:
    """A checkpoint of a LoRA run."""

    folder: Path
    """The iteration's folder, in PEFT's format."""
    lora: LoraConfig
    state: Mapping[str, Any]
    """RUN_FILE."""

    @property
    def base(self) -> Path | None:
        """Where the base model was."""
        return Path(self.state["base"]) if self.state["base"] else None

    def start_anew(self, base: Path | None = None) -> str:
        """The flags that begin a new run on its adapter, with its own base model or another."""
        return f"--load {base or self.base or 'BASE'} --finetune --lora-load {self.folder}"

    def check_optimizer(self, kinds: Iterable[str]) -> None:
        """Refuses an optimizer state that lacks one of `kinds`.

        Raises:
            UserError: with the way out.
        """
        if missing := [kind for kind in kinds if kind not in self.state["optimizer"]]:
            raise UserError(
                f"{self.folder}: {', '.join(missing)} of the optimizer are missing; "
                "--no-load-optim goes on without."
            )


def find_saved_lora(folder: Path | None) -> SavedLora | None:
    """The last checkpoint of a LoRA run in `folder`, or None where there is no such thing.

    Raises:
        UserError: it is damaged.
    """
    if folder is None:
        return None
    iteration = megatron.tracked_folder(folder)
    if not (iteration / RUN_FILE).exists() or not (iteration / CONFIG_FILE).exists():
        return None
    path = iteration / RUN_FILE
    try:
        state = json.loads(read_bytes(path))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); the adapter beside it can be the start of a new "
            f"run: --lora-load {iteration}."
        ) from None
    return SavedLora(folder=iteration, lora=read_lora_config(iteration), state=state)
