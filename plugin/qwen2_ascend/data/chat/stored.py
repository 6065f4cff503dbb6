"""Tokenized chats, read from the files that `stored_files.py` tells of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen2_ascend.data.chat.stored_files import IGNORED, dataset_path
from qwen2_ascend.data.indexed import largest_token, open_indexed
from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.files import read_bytes


class StoredChats:
    """Tokenized chats of one or more prefixes, one after the other."""

    lengths: np.ndarray
    """Tokens of each row."""
    is_packed: bool
    """Whether rows are packs."""

    def __init__(self, prefixes: Sequence[str | Path], side: str = "") -> None:
        """Opens the files.

        Args:
            prefixes: what comes before `_packed_input_ids_document`.
            side: "", or "chosen_" or "rejected_" of preference pairs.

        Raises:
            UserError: files are missing or damaged, do not fit one another, or packs and single
                chats are mixed.
        """
        faults: list[str] = []
        self._parts: list[_Part] = []
        for prefix in prefixes:
            try:
                self._parts.append(_Part(prefix, side))
            except UserError as error:
                faults += error.faults
        raise_if(faults)
        packed = [str(part.prefix) for part in self._parts if part.is_packed]
        if packed and len(packed) < len(self._parts):
            raise UserError(
                f"{', '.join(packed)}: packed when prepared, the other data is not; prepare all "
                "of it in the same way."
            )
        self.is_packed = bool(packed)
        self.lengths = np.concatenate([part.lengths for part in self._parts])
        self._starts = np.cumsum([0, *(len(part.lengths) for part in self._parts)])

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def mixing(self) -> tuple[str, ...]:
        """Prefixes of packs whose chats see one another: prepared by --pack without --neat-pack."""
        return tuple(str(part.prefix) for part in self._parts if part.mixes_chats)

    @property
    def pad_token(self) -> int | None:
        """What the preparation noted as the tokenizer's; None when it was not ours."""
        return next((p.pad_token for p in self._parts if p.pad_token is not None), None)

    def chats(self, row: int, limit: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The chats in `row`, of each the ids and whether each token is trained on.

        A row that is not a pack is one chat, cut to `limit` tokens.
        """
        part, row = self._place(row)
        return self._parts[part].chats(row, limit)

    def _place(self, row: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        return part, int(row - self._starts[part])

    def where(self, row: int) -> str:
        """The row as a user finds it: counted from 0 in its file."""
        part, row = self._place(row)
        return f"row {row} of {self._parts[part].prefix}"

    def largest_token(self) -> int:
        """The largest id, or that of some rows spread evenly over data prepared elsewhere."""
        return max(part.largest_token() for part in self._parts)

    def num_trained(self, row: int, limit: int) -> int:
        """Tokens of `row` that have a loss when it is cut to `limit`; the first never has."""
        return sum(int(trained[1:].sum()) for _, trained in self.chats(row, limit))


class _Part:
    def __init__(self, prefix: str | Path, side: str) -> None:
        self.prefix, self._side = prefix, side
        self._ids = open_indexed(dataset_path(prefix, f"{side}input_ids"))
        self._labels = open_indexed(dataset_path(prefix, f"{side}labels"))
        masks = dataset_path(prefix, "attention_mask")
        self._masks: Any = None
        if not side and Path(f"{masks}.idx").exists():
            self._masks = open_indexed(masks)
        self.lengths = np.array(self._ids.sequence_lengths)
        about = self._about(f"{side}input_ids")
        if about != self._about(f"{side}labels"):
            raise UserError(
                f"{prefix}: input_ids and labels are not of one run: one is as an earlier run left "
                "it. Prepare the data again, with --overwrite."
            )
        raise_if(self._faults())
        pad_token = about.get("pad_token")
        self.pad_token = pad_token if isinstance(pad_token, int) else None
        self.is_packed = bool(about.get("pack")) or self._has_packs()
        self.mixes_chats = self.is_packed and not about.get("neat_pack") and not self._has_packs()

    def _faults(self) -> list[str]:
        for name, other in (("labels", self._labels), ("attention_mask", self._masks)):
            if other is not None and not np.array_equal(self.lengths, other.sequence_lengths):
                return [
                    f"{self.prefix}: input_ids and {name} are not of the same lengths; they are "
                    "not of one run. Prepare the data again."
                ]
        for row in self._sampled():
            ids, labels = self._ids[row], self._labels[row]
            wrong = (labels != IGNORED) & (labels != ids)
            if wrong.any():
                at = int(wrong.argmax())
                return [
                    f"{self.prefix}: row {row} has the label {labels[at]} at token {ids[at]}; "
                    f"labels are {IGNORED} or the token itself."
                ]
        return []

    def largest_token(self) -> int:
        """The largest of all rows where the preparation noted it, else of some."""
        noted = largest_token(dataset_path(self.prefix, f"{self._side}input_ids"))
        return noted if noted is not None else max(int(self._ids[r].max()) for r in self._sampled())

    def _sampled(self, count: int = 64) -> range:
        return range(0, len(self.lengths), -(-len(self.lengths) // count))

    def _about(self, key: str) -> dict[str, Any]:
        """What decided about one dataset, as the preparation noted it."""
        path = Path(f"{dataset_path(self.prefix, key)}.json")
        try:
            return dict(json.loads(read_bytes(path))["settings"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # written by MindSpeed-LLM

    def _has_packs(self) -> bool:
        return self._masks is not None and any(
            (self._masks[row] != 1).any() for row in self._sampled()
        )

    def chats(self, row: int, limit: int) -> list[tuple[np.ndarray, np.ndarray]]:
        ids, labels = self._ids[row], self._labels[row]
        if not self.is_packed:
            ids, labels = ids[:limit], labels[:limit]
            return [(ids, labels != IGNORED)]
        mask = np.ones_like(ids) if self._masks is None else self._masks[row]
        cuts = np.flatnonzero(np.diff(mask)) + 1
        pieces = zip(np.split(ids, cuts), np.split(labels, cuts), np.split(mask, cuts), strict=True)
        return [(i, la != IGNORED) for i, la, m in pieces if m[0]]
