"""Tokenized chats on disk, in the layout MindSpeed-LLM gives instruction data.

Under PREFIX_packed_ lie indexed datasets, one document a row in each, all of one length:
`input_ids_document`; `labels_document`, the same ids where the token is trained on and -100 where
not (not moved: the training moves them); `attention_mask_document`, 1 everywhere, but in rows that
are packs the number of the chat, from 1, and 0 on padding (MindSpeed-LLM's --neat-pack).
Preference pairs have `chosen_` and `rejected_` before `input_ids` and `labels`, and no mask.
"""

from __future__ import annotations

from pathlib import Path

IGNORED = -100
"""The label of a token that is not trained on."""
SIDES = {"sft": ("",), "dpo": ("chosen_", "rejected_")}
"""What comes before input_ids and labels in the files' names."""


def dataset_path(prefix: str | Path, key: str) -> Path:
    """The prefix of one indexed dataset: `key` is input_ids, chosen_labels, ..."""
    return Path(f"{prefix}_packed_{key}_document")
