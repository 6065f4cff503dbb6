"""`preprocess --task sft|dpo`: files of chats to the files of `stored_files.py`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import xxhash

from qwen2_ascend.chat_template import all_templates
from qwen2_ascend.data.chat.check import find_formats
from qwen2_ascend.data.chat.encoding import ChatEncoder, output_keys
from qwen2_ascend.data.chat.formats import RowFormat
from qwen2_ascend.data.chat.rendering import given_template
from qwen2_ascend.data.chat.rows import find_chat_files, read_chat_rows
from qwen2_ascend.data.chat.summary import print_summary
from qwen2_ascend.data.inputs import InputFile
from qwen2_ascend.data.output import Output
from qwen2_ascend.data.settings import PreprocessSettings
from qwen2_ascend.data.state import Counts, State
from qwen2_ascend.machine import num_cores
from qwen2_ascend.pretrained import open_tokenizer
from qwen2_ascend.prompt_types import check_tokenizer

BYTES_PER_WORKER = 4 * 2**20
"""A worker takes seconds to start, so small files are not worth many."""


def preprocess_chats(settings: PreprocessSettings) -> None:
    """Does what `settings` say and prints a summary.

    Raises:
        UserError: input, tokenizer or output cannot be used, or a bad row was met.
        OSError: the output cannot be written; finished parts are kept.
    """
    started = time.monotonic()
    files, reading = find_chat_files(
        settings.input, settings.input_format, settings.max_document_bytes
    )
    formats = find_formats(files, reading, settings.task, settings.chat)
    for path, found in formats.items():
        print(f"{path}: {found.describe()}", flush=True)
    template = given_template(settings.chat)
    tokenizer = open_tokenizer(settings.tokenizer_name_or_path)
    if settings.chat.prompt_type is not None:
        check_tokenizer(settings.chat.prompt_type, tokenizer)
    keys = output_keys(settings.task)
    state = State(
        settings=_deciding_settings(settings, files, formats, tokenizer, template),
        counts={key: Counts() for key in keys},
    )
    if settings.pack and not settings.neat_pack:
        print("note: the chats of a pack see one another; --neat-pack parts them.", flush=True)
    output = Output(settings, keys)
    if output.is_complete(state.settings):
        print(f"{output.prefix}: complete already; nothing to do.")
        return
    with output.work_folder(state) as (folder, state):
        from qwen2_ascend.data.chat.writing import write_chats  # what refusals do without

        lengths, packs = write_chats(
            settings,
            files,
            read_chat_rows(files, reading, state.position),
            partial(ChatEncoder, settings, formats, template),
            folder,
            state,
            output,
            workers=settings.workers or _useful_workers(files),
        )
        output.publish(folder, state)
    print_summary(output, settings, state, lengths, packs, time.monotonic() - started)


def _useful_workers(files: Sequence[InputFile]) -> int:
    return min(num_cores(), 1 + sum(file.size for file in files) // BYTES_PER_WORKER)


def _deciding_settings(
    settings: PreprocessSettings,
    files: Sequence[InputFile],
    formats: dict[str, RowFormat],
    tokenizer: Any,
    template: str | None,
) -> dict[str, Any]:
    # also finds out whether there is a template before any work begins
    templates = all_templates(tokenizer, template)
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.name_or_path
    pad_token = tokenizer.pad_token_id
    deciding = {
        "task": settings.task,
        "input": [[os.path.abspath(f.path), f.format, f.size, f.mtime_ns] for f in files],
        "formats": [asdict(found) for found in formats.values()],
        "max_document_bytes": settings.max_document_bytes,
        "tokenizer": xxhash.xxh3_64(backend.encode()).hexdigest(),
        # named templates are tokenized in other pieces than the same text in a file
        "prompt_type": settings.chat.prompt_type,
        "chat_template": xxhash.xxh3_64("\0".join(templates.values()).encode()).hexdigest(),
        "vocab_size": len(tokenizer),
        "pad_token": pad_token if pad_token is not None else tokenizer.eos_token_id or 0,
        "train_on_prompt": settings.chat.train_on_prompt,
        "mask_history": settings.chat.mask_history,
        "seq_length": settings.seq_length,
        "pack": settings.packs,
        "neat_pack": settings.neat_pack,
        "seed": settings.seed if settings.packs else None,
        # labels are negative where there is no loss, so never uint16
        "dtype": "int32",
    }
    return json.loads(json.dumps(deciding))
