"""What can be said of chats before they are prepared: whether they are there, in which format."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from qwen2_ascend.data.chat.formats import RowFormat, detect_format, parse_map_keys, row_format
from qwen2_ascend.data.chat.rows import (
    find_chat_files,
    is_chat_file,
    read_chat_rows,
    where,
)
from qwen2_ascend.data.chat.settings import ChatDataSettings, ChatSettings
from qwen2_ascend.data.chat.stored_files import SIDES, dataset_path
from qwen2_ascend.data.index_files import check_indexed
from qwen2_ascend.data.inputs import InputFile, Position, Reading
from qwen2_ascend.data.tokenization import parse_row
from qwen2_ascend.errors import Faults, UserError, raise_if
from qwen2_ascend.files import missing, reading
from qwen2_ascend.flags import given_flags

ROWS_TO_DETECT = 100
MAX_ROW_BYTES = 16 * 2**20
"""The most bytes of rows that a format is recognized by."""
MAX_ARRAY_BYTES = 64 * 2**20
"""The largest JSON array that is read for it, as a whole; the preparation reads any."""


def check_chat_data(
    data: ChatDataSettings, chat: ChatSettings, task: str, *, saves_template: bool = False
) -> None:
    """What can be said of the data of a task, sft or dpo, before there is a process group.

    Args:
        data: all flags about the data.
        chat: all flags about chats.
        task: sft or dpo.
        saves_template: whether --chat-template is written beside the tuned model.

    Raises:
        UserError: data that is missing, unreadable, empty, damaged or in no known format, or
            settings that contradict; every fault at once.
    """
    paths = (data.data_path, data.train_data_path, data.valid_data_path)
    faults = Faults(path_faults(*paths))
    faults += packing_faults(task, data.pack, data.variable_seq_lengths)
    flags = ("--data-path", "--train-data-path", "--valid-data-path")
    words = {word: flag for flag, given in zip(flags, paths, strict=True) for word in given}
    if words and not any(map(is_chat_file, words)):
        faults += _prepared_faults(chat, task, saves_template)
    for word, flag in words.items():
        if not is_chat_file(word):
            for side in () if _is_number(word) else SIDES[task]:
                for key in ("input_ids", "labels"):
                    faults.collect(partial(check_indexed, dataset_path(word, f"{side}{key}")))
        elif not os.path.isfile(word):
            faults.append(f"{flag} {word}: {missing(word)}.")
        else:
            faults.collect(partial(_check_file, word, chat, task))
    raise_if(faults)


def _prepared_faults(chat: ChatSettings, task: str, saves_template: bool) -> list[str]:
    """Flags about how chats are read, where all have been read before."""
    names = ("train_on_prompt", "mask_history", "map_keys")
    return [
        f"{flag}: the data is prepared, and its tokens and masks hold; prepare it again with "
        f"qwen2-ascend preprocess --task {task} {flag}, or give the file of chats."
        for flag in given_flags(chat, names if saves_template else (*names, "chat_template"))
    ]


def path_faults(
    data_path: Sequence[str], train_data_path: Sequence[str], valid_data_path: Sequence[str]
) -> list[str]:
    """What is wrong with the flags that name data, wherever they lead."""
    if bool(data_path) == bool(train_data_path or valid_data_path):
        return [
            "give --data-path (divided by --split), or --train-data-path and --valid-data-path; "
            f"{'both were' if data_path else 'none was'} given."
        ]
    words = [*data_path, *train_data_path, *valid_data_path]
    return [
        f"--data-path {word}: chats are not blended by weights; give files and prefixes only, "
        "each as often as it is to count."
        for word in words
        if _is_number(word)
    ]


def packing_faults(task: str, pack: bool, variable_seq_lengths: bool) -> list[str]:
    """What is wrong with how samples are to be filled."""
    faults = []
    if pack and variable_seq_lengths:
        faults.append("--pack fills samples up to --seq-length; leave --variable-seq-lengths out.")
    if pack and task == "dpo":
        faults.append("--pack is for chats; preference pairs take --variable-seq-lengths.")
    return faults


def find_formats(
    files: Sequence[InputFile], reading: Reading, task: str, chat: ChatSettings
) -> dict[str, RowFormat]:
    """The format of each file: what --handler-name says, or what its first good row is in.

    Raises:
        UserError: none of a file's first rows is in a known format.
    """
    map_keys = parse_map_keys(chat.map_keys)
    if chat.format != "auto":
        found = row_format(chat.format, task, map_keys)
        return {file.path: found for file in files}
    formats, faults = {}, Faults()
    for file in files:
        detect = partial(detect_format, task=task, map_keys=map_keys)
        formats[file.path] = faults.collect(partial(_first_good, file, reading, detect))
    raise_if(faults)
    return formats


def _check_file(path: str, chat: ChatSettings, task: str) -> None:
    with reading(path):
        files, options = find_chat_files([path], "auto", MAX_ROW_BYTES)
        if files[0].format == "json" and files[0].size > MAX_ARRAY_BYTES:
            return
        formats = find_formats(files, options, task, chat)
        if chat.format != "auto":
            _first_good(files[0], options, formats[path].chats)


def _first_good(file: InputFile, reading: Reading, take: Callable[[Any], Any]) -> Any:
    """What `take` makes of the first row that it can take.

    Raises:
        UserError: it can take none of the first rows; the message is about the first one.
    """
    reason = ""
    for row, _, _ in islice(read_chat_rows([file], reading, Position()), ROWS_TO_DETECT):
        try:
            return take(parse_row(row.raw or b""))
        except ValueError as error:
            reason = reason or f"{where(row)}: {error}"
    raise UserError(f"{reason or f'{file.path}: holds no row'}.")


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return not Path(word).exists()
