"""Fine-tuning before the start, as `training.launch` says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen2_ascend.data.chat.check import check_chat_data
from qwen2_ascend.finetuning.plan import make_plan
from qwen2_ascend.finetuning.settings import FinetuneSettings, validate
from qwen2_ascend.training.launch import launch
from qwen2_ascend.training.plan import RunPlan

if TYPE_CHECKING:
    from qwen2_ascend.runtime import Runtime


def finetune(settings: FinetuneSettings) -> None:
    """Tunes as `settings` say, as one rank of torchrun's or as a process alone.

    Raises:
        UserError: settings, data or checkpoint are not as they have to be.
        NonFiniteError: the loss or the gradient norm is not finite, and that is to end the run.
    """
    launch(settings, make_plan, validate, check_data, _tune)


def check_data(settings: FinetuneSettings) -> None:
    """What can be said of the data before there is a process group.

    Raises:
        UserError: every fault at once.
    """
    saves_template = settings.export.save_hf is not None
    check_chat_data(
        settings.data, settings.chat, settings.tuning.stage, saves_template=saves_template
    )


def _tune(plan: RunPlan[FinetuneSettings], runtime: Runtime) -> None:
    from qwen2_ascend.finetuning.finetune import tune  # megatron-core, after the start

    tune(plan, runtime)
