"""The command line of `launch/pretrain_qwen2.py`; `launch` goes on."""

from __future__ import annotations

from collections.abc import Sequence

from qwen2_ascend.launching import launched
from qwen2_ascend.training.settings import PretrainSettings, parse


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of `launch/pretrain_qwen2.py` with these flags, or sys.argv's."""
    return launched(lambda: _pretrain(parse(arguments)), goes_on=True)


def _pretrain(settings: PretrainSettings) -> None:
    from qwen2_ascend.training.launch import pretrain  # what --help does without

    pretrain(settings)
