"""Train and fine-tune Qwen2 / Qwen2.5 on Ascend NPU clusters with megatron-core."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen2_ascend.planning.report import Result

__version__ = "0.1.0"


def plan(model: str | None = None, num_devices: int | None = None, **options: Any) -> Result:
    """What `qwen2-ascend plan` answers, as data: `plans`, the best first, and `fewest`.

    Args:
        model: a Hugging Face folder, a config.json, or a published model's name.
        num_devices: devices that the job runs on; this and the model may be left to `from_log`.
        **options: the command's other flags, with underscores.

    Raises:
        UserError: options that cannot be.
    """
    from qwen2_ascend.planning import command

    return command.plan(command.PlanOptions(model=model, num_devices=num_devices, **options))
