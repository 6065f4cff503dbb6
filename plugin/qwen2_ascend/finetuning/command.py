"""The command line of `launch/finetune_qwen2.py`; `launch` goes on."""

from __future__ import annotations

from collections.abc import Sequence

from qwen2_ascend.finetuning.settings import FinetuneSettings, parse
from qwen2_ascend.launching import launched


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of `launch/finetune_qwen2.py` with these flags, or sys.argv's."""
    return launched(lambda: _finetune(parse(arguments)), goes_on=True)


def _finetune(settings: FinetuneSettings) -> None:
    from qwen2_ascend.finetuning.launch import finetune  # what --help does without

    finetune(settings)
