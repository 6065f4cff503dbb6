"""MindSpeed-LLM's published command lines for the Qwen2 family, flag by flag.

Of its branches 2.2.0 and master; PATH stands for each path. The mixture-of-experts models among
them are no Qwen2 of this project; their lines are refused, and tests ask for the refusal.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple


class CommandLine(NamedTuple):
    """One of them."""

    name: str
    """The script it is from: branch/family/script."""
    kind: str
    """pretrain, finetune, convert, preprocess, generate or evaluate."""
    size: str
    """The model's size, such as 7B."""
    world_size: int
    flags: list[str]

    @property
    def is_moe(self) -> bool:
        """Whether it is of a model with experts."""
        return "--num-experts" in self.flags or "--moe-grouped-gemm" in self.flags

    def values(self, flag: str) -> list[str]:
        """The words that follow a flag."""
        words = self.flags[self.flags.index(flag) + 1 :]
        end = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
        return words[:end]

    def with_paths(self, paths: dict[str, str | Path]) -> list[str]:
        """The line with a path of ours behind each flag that has one."""
        before = ["", *self.flags]
        return [
            str(paths[flag]) if word == "PATH" else word
            for flag, word in zip(before, self.flags, strict=False)
        ]


def command_lines(kind: str) -> list[CommandLine]:
    """Those of one kind."""
    rows = json.loads((Path(__file__).parent / "mindspeed_llm_flags.json").read_text())
    return [CommandLine(**row) for row in rows if row["kind"] == kind]


def line_named(kind: str, name: str) -> CommandLine:
    """The one of a kind that is from a script."""
    (line,) = (line for line in command_lines(kind) if line.name == name)
    return line
