"""The command line of `launch/finetune_qwen2_deepspeed.py`; `launch` goes on."""

from __future__ import annotations

from collections.abc import Sequence

from qwen2_ascend.finetuning.deepspeed.settings import ZeroFinetuneSettings, parse
from qwen2_ascend.launching import launched


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of `launch/finetune_qwen2_deepspeed.py` with these flags, or sys.argv's."""
    return launched(lambda: _finetune(parse(arguments)), goes_on=True)


def _finetune(settings: ZeroFinetuneSettings) -> None:
    from qwen2_ascend.finetuning.deepspeed.launch import finetune  # what --help does without

    finetune(settings)
