"""Writes tokenized chats: one to a row, and then packs of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen2_ascend.data.chat.packing import best_fit_decreasing
from qwen2_ascend.data.chat.stored_files import IGNORED
from qwen2_ascend.data.indexed import IndexedDatasetBuilder, open_indexed
from qwen2_ascend.data.inputs import InputFile, Rows
from qwen2_ascend.data.output import Output
from qwen2_ascend.data.settings import PreprocessSettings
from qwen2_ascend.data.state import State
from qwen2_ascend.data.tokenization import EncodeRows
from qwen2_ascend.data.writing import write_datasets


def write_chats(
    settings: PreprocessSettings,
    files: Sequence[InputFile],
    rows: Rows,
    make_encoder: Callable[[], EncodeRows],
    folder: Path,
    state: State,
    output: Output,
    *,
    workers: int,
) -> tuple[list[np.ndarray], int | None]:
    """Writes the datasets of chats; the arguments are those of `write_datasets`.

    Returns:
        The tokens of each chat, of pairs of each side; and how many packs there are, if any.
    """
    keys = list(state.counts)
    # packs are made of whole files, so these lie beside the result until then
    stem = "chats_" if settings.packs else ""
    names = {key: f"{stem}{output.dataset(key).name}" for key in keys}
    if not state.is_joined:
        write_datasets(
            settings,
            files,
            rows,
            make_encoder,
            folder,
            state,
            names=names,
            bad_rows_name=output.bad_rows.name,
            workers=workers,
        )
    lengths = [_chat_lengths(folder / names[key]) for key in keys if "input_ids" in key]
    if not settings.packs:
        return lengths, None
    targets = {key: folder / output.dataset(key).name for key in keys}
    sources = {key: folder / name for key, name in names.items()}
    return lengths, _pack(sources, targets, settings, state.settings["pad_token"])


def _chat_lengths(prefix: Path) -> np.ndarray:
    """Tokens of each chat of the finished files at `prefix`."""
    dataset = open_indexed(prefix)
    # a copy, while the dataset is there: a view outlives the memory map and crashes
    return np.array(dataset.sequence_lengths)


def _pack(
    sources: dict[str, Path],
    targets: dict[str, Path],
    settings: PreprocessSettings,
    pad_token: int,
) -> int:
    """Writes rows of --seq-length that hold several chats, and padding; how many.

    With --neat-pack the attention mask numbers the chats of a row from 1 and is 0 on padding.
    Without it the mask is 1 everywhere: a row is trained on as one text.
    """
    seq_length = settings.seq_length
    assert seq_length is not None
    is_neat = settings.neat_pack
    fill = {"input_ids": pad_token, "labels": IGNORED, "attention_mask": 0 if is_neat else 1}
    packing = None
    for key, source in sources.items():
        chats = open_indexed(source)
        if packing is None:
            packing = best_fit_decreasing(chats.sequence_lengths, seq_length, settings.seed)
        kind = key.removeprefix("packed_")
        builder = IndexedDatasetBuilder(f"{targets[key]}.bin", dtype=np.int32)
        with contextlib.closing(builder.data_file):
            for index in range(len(packing)):
                row: Any = np.full(seq_length, fill[kind], dtype=np.int32)
                at = 0
                for number, chat in enumerate(packing.pack(index).tolist(), 1):
                    piece = chats[chat]
                    numbers = is_neat and kind == "attention_mask"
                    row[at : at + len(piece)] = number if numbers else piece
                    at += len(piece)
                builder.add_document(row, [seq_length])
            builder.finalize(f"{targets[key]}.idx")
    assert packing is not None
    return len(packing)
