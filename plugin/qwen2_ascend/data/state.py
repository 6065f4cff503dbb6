"""`state.json`: what an unfinished preprocessing run has done, beside its parts (`parts.py`)."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qwen2_ascend.data.inputs import Position
from qwen2_ascend.errors import UserError
from qwen2_ascend.files import fsync_folder, read_bytes, write_file

STATE = "state.json"


@dataclass(kw_only=True)
class Counts:
    """What went into one key's output."""

    documents: int = 0
    tokens: int = 0
    shortest: int = 0
    longest: int = 0
    largest_token: int = 0
    """The largest id; a model with fewer rows in its embedding cannot take the data."""

    def add(self, lengths: np.ndarray, tokens: np.ndarray) -> None:
        """Counts documents of these lengths, in tokens, and their tokens."""
        if not lengths.size:
            return
        shortest, longest = int(lengths.min()), int(lengths.max())
        self.shortest = min(self.shortest, shortest) if self.documents else shortest
        self.longest = max(self.longest, longest)
        self.documents += lengths.size
        self.tokens += int(lengths.sum())
        self.largest_token = max(self.largest_token, int(tokens.max(initial=0)))


@dataclass(kw_only=True)
class State:
    """What an unfinished run has done; the contents of `state.json`."""

    settings: dict[str, Any]
    """All that decides about the result; a run is only resumed with the same."""
    num_parts: int = 0
    position: Position = field(default_factory=Position)
    counts: dict[str, Counts] = field(default_factory=dict)
    bad_rows: int = 0
    tallies: dict[str, int] = field(default_factory=dict)
    """Whatever else the encoder counts."""
    is_joined: bool = False
    """True when the whole result lies in the folder and only waits to be renamed."""

    def save(self, folder: Path) -> None:
        """Writes it whole; with it everything that was flushed before counts."""
        write_file(folder / STATE, json.dumps(asdict(self), indent=1).encode())
        fsync_folder(folder)

    @classmethod
    def load(cls, folder: Path) -> State | None:
        """The state in `folder`, None when there is none.

        Raises:
            UserError: it is not one of this version's.
        """
        path = folder / STATE
        if not path.exists():
            return None
        try:
            raw = json.loads(read_bytes(path))
            raw["counts"] = {key: Counts(**counts) for key, counts in raw["counts"].items()}
            raw["position"] = Position(*raw["position"])
            return cls(**raw)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} cannot be read ({error}); start again with --overwrite."
            ) from None


def part_name(number: int) -> str:
    """What all files of a part start with."""
    return f"part_{number:06d}"


def remove_unfinished(folder: Path, state: State) -> None:
    """Removes what no state knows of: the part in work when a run was killed, or everything."""
    known = tuple(part_name(n) for n in range(state.num_parts))
    for entry in os.scandir(folder):
        keep = entry.name.startswith(known) or not entry.name.startswith("part_")
        if not (keep and state.num_parts):
            os.unlink(entry.path)
