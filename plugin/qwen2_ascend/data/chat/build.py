"""The datasets of a fine-tuning run: what a launcher calls, on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from qwen2_ascend.data.chat.check import packing_faults, path_faults
from qwen2_ascend.data.chat.dataset import ChatDataset, EpochDataset, PairDataset
from qwen2_ascend.data.chat.prepare import Preparation, prepared
from qwen2_ascend.data.chat.settings import ChatSettings
from qwen2_ascend.data.chat.stored import StoredChats
from qwen2_ascend.data.chat.stored_files import SIDES
from qwen2_ascend.data.pretraining import split_matrix
from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.vocabulary import unknown_tokens

SHOWN_BAD_ROWS = 20


class ChatDatasets(NamedTuple):
    """Training and validation data; `valid` is None where none is wanted or there is none."""

    train: EpochDataset
    valid: EpochDataset | None
    notes: tuple[str, ...]
    """What to say about the data, a line each; the same on every rank."""


@dataclass(frozen=True, kw_only=True)
class ChatDatasetBuilder:
    """Builds the training and validation datasets of chats, by `build`. Every rank calls it.

    Files of chats are prepared first, by rank 0, into `data_cache_path`; the others wait and read
    the result. A file that was prepared before with the same settings is not prepared again.

    The datasets go to `data.sampler.build_data_iterator`, which batches with their `collate`:
    BATCH_KEYS `[b, s]` and `index` `[b]`; when `train.is_packed` also `ends`, a tuple of ints
    (cumulative, row after row, the last is b * s). Of task "dpo" a batch of b pairs has 2 b rows,
    the chosen ones first. Middle pipeline stages need `ends`, too.
    """

    seq_length: int
    """Longest sample, in tokens; longer chats are cut at the end."""
    seed: int
    """The seed of the packing and of every epoch's order."""
    num_samples: tuple[int | None, int] = (None, 0)
    """Samples wanted of train and valid, epochs are repeated as needed; None is one epoch, and
    `with_num_samples` changes it later."""
    task: Literal["sft", "dpo"] = "sft"
    """What the data is for: sft takes chats, dpo preference pairs."""
    data_path: Sequence[str] = ()
    """Prefixes and files, divided by `split`."""
    train_data_path: Sequence[str] = ()
    """The same, for training alone; instead of `data_path`."""
    valid_data_path: Sequence[str] = ()
    """The same, for validation."""
    split: str = "100,0,0"
    """Shares of train, valid and test in `data_path`, by rows in their order."""
    tokenizer: str | Path | None = None
    """Hugging Face folder; only needed for files of chats."""
    chat: ChatSettings = field(default_factory=ChatSettings)
    """How files of chats are read."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What to do with a row that is no chat or has no token to train on."""
    pack: bool = False
    """Put several chats into a sample; not for "dpo"."""
    variable_seq_lengths: bool = False
    """Pad a micro-batch to its longest chat only; not with `pack`."""
    pad_to_multiple_of: int = 1
    """The batch's length is a multiple of it, with `variable_seq_lengths`."""
    shuffle: bool = True
    """Give every epoch an order of its own."""
    vocab_size: int | None = None
    """Rows of the model's embedding; the data's largest token is checked against it where the
    preparation noted that, else a sample of the tokens, and later every batch."""
    data_cache_path: str | Path | None = None
    """Where files are prepared, on storage that all nodes share; a folder `.qwen2_ascend_cache`
    beside each file when None."""
    workers: int | None = None
    """Processes that prepare; by default as many as there are cores."""
    keep_chats_apart: bool = False
    """Refuse packs whose chats see one another."""
    _notes: list[str] = field(default_factory=list, init=False)

    def build(self) -> ChatDatasets:
        """Both datasets.

        Raises:
            UserError: data that is missing, damaged or too little, or settings that contradict.
        """
        faults = path_faults(self.data_path, self.train_data_path, self.valid_data_path)
        faults += packing_faults(self.task, self.pack, self.variable_seq_lengths)
        raise_if(faults)
        preparation = Preparation(
            self.task,
            self.tokenizer,
            self.chat,
            self.on_bad_row,
            self.data_cache_path,
            self.workers,
        )
        given = (self.data_path or self.train_data_path, self.data_path or self.valid_data_path)
        prefixes = prepared(list(dict.fromkeys(chain.from_iterable(given))), preparation)
        self._notes.clear()
        train, valid = (
            self._epochs(name, [prefixes[word] for word in words], share, wanted)
            for name, words, share, wanted in zip(
                ("train", "valid"), given, self._shares(), self.num_samples, strict=True
            )
        )
        if train is None:
            raise UserError("there is no training data: give --data-path or --train-data-path.")
        return ChatDatasets(train, valid, tuple(self._notes))

    def _shares(self) -> tuple[tuple[float, float], ...]:
        """(first, last) of the rows of each split, as shares of all."""
        if not self.data_path:
            return (0.0, 1.0), (0.0, 1.0)

        return tuple(split_matrix(self.split)[:2])

    def _epochs(
        self, name: str, prefixes: Sequence[str], share: tuple[float, float], wanted: int | None
    ) -> EpochDataset | None:
        """The wanted number of samples of this share of the rows; None where there are none.

        Raises:
            UserError: as `_source`; or samples are wanted, and there is no row to take them from.
        """
        source = self._source(name, prefixes, share) if prefixes and wanted != 0 else None
        if source is not None:
            return EpochDataset(
                source,
                num_samples=wanted,
                seed=self.seed,
                shuffle=self.shuffle,
                vocab_size=self.vocab_size,
            )
        if wanted:
            raise UserError(
                f"{wanted} {name} samples are wanted and there is no {name} data; give "
                f"--{name}-data-path, or {name} a share of --split {self.split}."
            )
        return None

    def _source(
        self, name: str, prefixes: Sequence[str], share: tuple[float, float]
    ) -> ChatDataset | PairDataset | None:
        """The dataset of this share of the rows; None when no row is left.

        Raises:
            UserError: the files are not as they should be, or hold rows that cannot be used.
        """
        sides = [StoredChats(prefixes, side) for side in SIDES[self.task]]
        self._check(prefixes, sides)
        first, last = (round(edge * len(sides[0])) for edge in share)
        rows = self._usable(name, sides, np.arange(first, last))
        if not len(rows):
            return None
        source = self._dataset(sides, rows)
        self._notes.append(self._describe(name, sides, rows, source))
        return source

    def _check(self, prefixes: Sequence[str], sides: Sequence[StoredChats]) -> None:
        words = " ".join(prefixes)
        faults = []
        if len({len(side) for side in sides}) > 1:
            faults.append(f"{words}: not as many rejected as chosen chats; prepare them again.")
        if sides[0].is_packed and self.variable_seq_lengths:
            faults.append(f"{words}: was packed when prepared; leave --variable-seq-lengths out.")
        longest = int(sides[0].lengths.max())
        if sides[0].is_packed and longest > self.seq_length:
            faults.append(
                f"{words}: was packed to {longest} tokens when prepared, --seq-length is "
                f"{self.seq_length}; give --seq-length {longest}, or prepare the chats again "
                "without --pack and pack them at start."
            )
        largest = max(side.largest_token() for side in sides)
        if self.vocab_size is not None and (unknown := unknown_tokens([largest], self.vocab_size)):
            faults.append(f"{words} {unknown}")
        if self.keep_chats_apart and sides[0].mixing:
            faults.append(
                f"{' '.join(sides[0].mixing)}: was packed so that the chats of a pack see one "
                "another, and they are not to; prepare it with --neat-pack."
            )
        raise_if(faults)

    def _usable(self, name: str, sides: Sequence[StoredChats], rows: np.ndarray) -> np.ndarray:
        """`rows` without those that teach nothing after cutting.

        No trained token is left of them, or the answers of a pair part behind the cut.
        """
        if sides[0].is_packed:
            return rows
        cut = [rows[side.lengths[rows] > self.seq_length].tolist() for side in sides]
        bad = {
            row
            for side, own in zip(sides, cut, strict=True)
            for row in own
            if not side.num_trained(row, self.seq_length)
        }
        rows = self._without(rows, bad, sides, f"{name} chat(s) have no token to train on")
        if len(sides) == 2:
            cut_rows = {*cut[0], *cut[1]} - bad
            same = {row for row in cut_rows if self._are_the_same(sides, row)}
            rows = self._without(rows, same, sides, f"{name} pair(s) have the same answers")
        return rows

    def _are_the_same(self, sides: Sequence[StoredChats], row: int) -> bool:
        (ids, _), (others, _) = (side.chats(row, self.seq_length)[0] for side in sides)
        return np.array_equal(ids, others)

    def _without(
        self, rows: np.ndarray, bad: set[int], sides: Sequence[StoredChats], what: str
    ) -> np.ndarray:
        """`rows` without `bad`, of which `what` is true up to --seq-length."""
        words = f"{what} in the first {self.seq_length:,}"
        if bad and self.on_bad_row == "stop":
            where = [sides[0].where(row) for row in sorted(bad)[:SHOWN_BAD_ROWS]]
            raise UserError(
                f"{len(bad)} {words}: {', '.join(where)}; take a larger --seq-length, or "
                "--on-bad-row skip."
            )
        if bad:
            self._notes.append(f"left out: {len(bad):,} {words}")
        return rows[~np.isin(rows, list(bad))]

    def _dataset(self, sides: Sequence[StoredChats], rows: np.ndarray) -> ChatDataset | PairDataset:
        # any valid id does: no loss is on it, and no token that has one sees it
        pad_token = sides[0].pad_token or 0
        if self.vocab_size is not None and pad_token >= self.vocab_size:
            pad_token = 0
        datasets = [
            ChatDataset(
                side,
                rows,
                seq_length=self.seq_length,
                pack=self.pack,
                seed=self.seed,
                pad_token=pad_token,
                variable_seq_lengths=self.variable_seq_lengths,
                pad_to_multiple_of=self.pad_to_multiple_of,
            )
            for side in sides
        ]
        return PairDataset(*datasets) if len(datasets) == 2 else datasets[0]

    def _describe(
        self,
        name: str,
        sides: Sequence[StoredChats],
        rows: np.ndarray,
        source: ChatDataset | PairDataset,
    ) -> str:
        cut = sum(int((side.lengths[rows] > self.seq_length).sum()) for side in sides)
        what = "packs" if sides[0].is_packed else "pairs" if len(sides) == 2 else "chats"
        words = [f"{len(rows):,} {what}", f"{source.num_tokens:,} tokens"]
        if cut:
            words.append(f"{cut:,} cut at {self.seq_length:,}")
        if source.is_packed and not sides[0].is_packed:
            full = source.num_tokens / (len(source) * self.seq_length)
            words.append(f"{len(source):,} samples of {self.seq_length:,}, {full:.1%} full")
        return f"{name}: {', '.join(words)}"
