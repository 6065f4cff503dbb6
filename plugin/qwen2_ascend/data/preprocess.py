"""Turns documents into Megatron's .bin/.idx: workers tokenize, one process writes, in order.

`inputs.py` gives the rows, `tokenization.py` their ids, `writing.py` and `parts.py` write them so
that a killed run can go on, and `output.py` renames the whole into place.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import xxhash

from qwen2_ascend.data.index_files import token_dtype
from qwen2_ascend.data.inputs import InputFile, Reading, check_inputs, find_inputs, read_rows
from qwen2_ascend.data.output import Output
from qwen2_ascend.data.progress import print_summary
from qwen2_ascend.data.settings import PreprocessSettings
from qwen2_ascend.data.state import Counts, State
from qwen2_ascend.data.tokenization import ENDOFTEXT, Encoder, TokenizerSpec, load_tokenizer
from qwen2_ascend.errors import Faults, UserError, raise_if
from qwen2_ascend.machine import num_cores


def preprocess_texts(settings: PreprocessSettings) -> None:
    """Does what `settings` say and prints a summary.

    Raises:
        UserError: input, tokenizer or output cannot be used, or a bad row was met.
        OSError: the output cannot be written; finished parts are kept.
    """
    started = time.monotonic()
    reading = Reading(settings.json_keys, settings.split_text_on, settings.max_document_bytes)
    files = find_inputs(settings.input, settings.input_format)
    faults = Faults(_cutting_faults(settings, files))
    faults.collect(lambda: check_inputs(files, reading))
    raise_if(faults)
    tokenizer = load_tokenizer(settings.tokenizer_name_or_path, settings.eod_token)
    for note in _tokenizer_notes(settings, tokenizer):
        print(f"note: {note}", flush=True)
    state = State(
        settings=_deciding_settings(settings, files, tokenizer),
        counts={key: Counts() for key in settings.json_keys},
    )
    output = Output(settings, settings.json_keys)
    if output.is_complete(state.settings):
        print(f"{output.prefix}: complete already; nothing to do.")
        return
    with output.work_folder(state) as (folder, state):
        resumed_tokens = sum(counts.tokens for counts in state.counts.values())
        if not state.is_joined:
            from qwen2_ascend.data.writing import write_datasets  # what refusals do without

            make_encoder = partial(
                Encoder,
                tokenizer,
                keys=settings.json_keys,
                dtype=state.settings["dtype"],
                append_eod=settings.append_eod,
                max_row_bytes=settings.max_document_bytes,
            )
            rows = read_rows(files, reading, state.position)
            workers = settings.workers or num_cores()
            names = {key: output.dataset(key).name for key in settings.json_keys}
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
        output.publish(folder, state)
    print_summary(output, state, time.monotonic() - started, resumed_tokens)


def _cutting_faults(settings: PreprocessSettings, files: Sequence[InputFile]) -> Iterator[str]:
    """What is wrong with --split-text-on, which is for text files alone."""
    if settings.split_text_on != "file" and all(file.format != "text" for file in files):
        yield (
            f"--split-text-on {settings.split_text_on} is for text files, and --input names none; "
            "leave it out, or say --input-format text."
        )


def _tokenizer_notes(settings: PreprocessSettings, tokenizer: TokenizerSpec) -> Iterator[str]:
    if not settings.append_eod:
        yield "documents run into one another: no --append-eod."
    elif tokenizer.eod is None:
        raise UserError(
            f"--append-eod: the tokenizer of {tokenizer.path} has no eos_token; name the token "
            "with --eod-token."
        )
    else:
        yield f"documents end with {tokenizer.eod_token} ({tokenizer.eod})."
        if settings.eod_token is None and tokenizer.eod_token == "<|im_end|>":
            yield f"Qwen's own pretraining ends documents with {ENDOFTEXT} (--eod-token)."


def _deciding_settings(
    settings: PreprocessSettings, files: Sequence[InputFile], tokenizer: TokenizerSpec
) -> dict[str, Any]:
    backend = tokenizer.backend or tokenizer.path
    return {
        "input": [[os.path.abspath(f.path), f.format, f.size, f.mtime_ns] for f in files],
        "json_keys": list(settings.json_keys),
        "split_text_on": settings.split_text_on,
        "max_document_bytes": settings.max_document_bytes,
        "tokenizer": xxhash.xxh3_64(backend.encode()).hexdigest(),
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod if settings.append_eod else None,
        "dtype": token_dtype(tokenizer.largest_token + 1),
    }
