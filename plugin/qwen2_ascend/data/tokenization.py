"""What a worker process does: rows in, token ids out.

Only `tokenizers` and numpy are imported here, neither torch nor transformers, so a worker starts in
a fraction of a second and dozens of them fit into memory. A tokenizer without a fast backend
is the exception.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from multiprocessing import connection, parent_process
from typing import Any, NamedTuple

import numpy as np

from qwen2_ascend.data.inputs import Row
from qwen2_ascend.errors import UserError
from qwen2_ascend.files import json_kind, json_value
from qwen2_ascend.pretrained import is_encodable, open_tokenizer

ENDOFTEXT = "<|endoftext|>"
"""What Qwen's pretraining data ends its documents with."""


class TokenizerSpec(NamedTuple):
    """A tokenizer as it is sent to workers."""

    path: str
    backend: str | None
    """The contents of a tokenizer.json, None when there is no fast backend."""
    split_special_tokens: bool
    vocab_size: int
    largest_token: int
    """The largest id that it has; there may be holes below it."""
    eod_token: str | None
    eod: int | None


class BadRow(NamedTuple):
    """A row that gives no document, and why."""

    where: str
    reason: str


class Encoded(NamedTuple):
    """A batch of rows, tokenized."""

    tokens: dict[str, np.ndarray]
    """All documents' ids one after the other, by key."""
    lengths: dict[str, np.ndarray]
    """Tokens of each document, by key."""
    bad_rows: list[BadRow]
    tallies: dict[str, int] | None = None
    """Whatever else is counted."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all keys, unless they are counted already."""
        return (self.tallies or {}).get(
            "tokens", sum(tokens.size for tokens in self.tokens.values())
        )


def load_tokenizer(path: str, eod_token: str | None) -> TokenizerSpec:
    """Reads a Hugging Face tokenizer.

    Args:
        path: a Hugging Face folder, or the name of a model in the local Hugging Face cache.
        eod_token: what ends a document; the tokenizer's own eos_token when None.

    Raises:
        UserError: no tokenizer there, or it does not know `eod_token`.
    """
    tokenizer = open_tokenizer(path)
    token = eod_token if eod_token is not None else tokenizer.eos_token
    vocabulary = tokenizer.get_vocab()
    if eod_token is not None and eod_token not in vocabulary:
        raise UserError(f"--eod-token {eod_token}: the tokenizer of {path} has no such token.")
    return TokenizerSpec(
        path=path,
        backend=tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else None,
        split_special_tokens=bool(getattr(tokenizer, "split_special_tokens", False)),
        vocab_size=len(tokenizer),
        largest_token=max(vocabulary.values(), default=0),
        eod_token=token,
        eod=None if token is None else int(vocabulary[token]),
    )


class Encoder:
    """Turns rows into token ids; one lives in each worker."""

    def __init__(
        self,
        spec: TokenizerSpec,
        *,
        keys: Sequence[str],
        dtype: str,
        append_eod: bool,
        max_row_bytes: int,
    ) -> None:
        # several processes tokenize; threads below each would only be in each other's way
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._keys = tuple(keys)
        self._dtype = np.dtype(dtype)
        self._eod = [spec.eod] if append_eod else []
        self._max_row_bytes = max_row_bytes
        self._ids = _encode_function(spec)

    def __call__(self, rows: Sequence[Row]) -> Encoded:
        bad: dict[int, str] = {}
        texts: dict[int, dict[str, str]] = {}
        for i, row in enumerate(rows):
            try:
                texts[i] = self._texts(row)
            except ValueError as error:
                bad[i] = str(error)
        ids = {
            key: dict(zip(texts, self._ids([t[key] for t in texts.values()]), strict=True))
            for key in self._keys
        }
        bad |= {i: f"{key!r} has no tokens" for key in ids for i in texts if not ids[key][i]}
        kept = [i for i in texts if i not in bad]
        return Encoded(
            tokens={key: self._joined([ids[key][i] for i in kept]) for key in self._keys},
            lengths={key: self._lengths([ids[key][i] for i in kept]) for key in self._keys},
            bad_rows=[BadRow(rows[i].where, bad[i]) for i in sorted(bad)],
        )

    def _texts(self, row: Row) -> dict[str, str]:
        """The text of each key.

        Raises:
            ValueError: a bad row; the message is the reason.
        """
        if row.raw is None:
            raise ValueError(
                f"longer than --max-document-bytes {self._max_row_bytes}; split it, or raise that"
            )
        if row.format == "text":
            values: dict[str, Any] = {self._keys[0]: row.raw}
        elif row.format == "parquet":
            values = dict(zip(self._keys, row.raw, strict=True))
        else:
            values = parse_row(row.raw)
            if not isinstance(values, dict):
                raise ValueError(f"is JSON but a {json_kind(values)}, not an object")
        return {key: _text(values, key, row.format) for key in self._keys}

    def _joined(self, documents: list[list[int]]) -> np.ndarray:
        pieces = (piece for ids in documents for piece in (ids, self._eod))
        return np.fromiter(chain.from_iterable(pieces), dtype=self._dtype)

    def _lengths(self, documents: list[list[int]]) -> np.ndarray:
        return np.array([len(ids) + len(self._eod) for ids in documents], dtype=np.int64)


def parse_row(raw: bytes) -> Any:
    """The JSON value of a row.

    Raises:
        ValueError: it is none; the message is the reason.
    """
    text = _utf8(raw)
    try:
        return json_value(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None


def _text(values: dict[str, Any], key: str, kind: str) -> str:
    if key not in values:
        has = ", ".join(map(repr, list(values)[:8])) or "none"
        raise ValueError(f"has no key {key!r}; its keys are {has}")
    value = values[key]
    if isinstance(value, bytes):
        value = _utf8(value)
    elif not isinstance(value, str):
        found = "null" if value is None else type(value).__name__
        raise ValueError(f"{key!r} is {found}, not a string")
    elif kind == "jsonl" and not is_encodable(value):
        raise ValueError(f"{key!r} holds half of a surrogate pair, which is no character")
    if not value:
        raise ValueError("is empty" if kind == "text" else f"{key!r} is empty")
    return value


def _utf8(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1}"
        ) from None


def _encode_function(spec: TokenizerSpec) -> Callable[[list[str]], list[list[int]]]:
    """Texts to ids, the same ids as calling the transformers tokenizer gives."""
    if spec.backend is None:
        slow = open_tokenizer(spec.path)
        return lambda texts: [slow(text).input_ids for text in texts]

    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_str(spec.backend)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = spec.split_special_tokens
    return lambda texts: [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]


EncodeRows = Callable[[Sequence[Row]], Encoded]

_encoder: EncodeRows | None = None


def start_worker(make_encoder: Callable[[], EncodeRows]) -> None:
    """Prepares a worker process: its encoder, and that it ends when its parent does."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sees Ctrl-C and ends its workers
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _encoder = make_encoder()


@contextlib.contextmanager
def without_ctrl_c() -> Iterator[None]:
    """Puts Ctrl-C off to the end of the block; a process started in it waits for `start_worker`.

    For seconds a new process imports what it needs, and would end in the middle of that.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def encode_in_worker(rows: Sequence[Row]) -> Encoded:
    """What a worker is sent."""
    assert _encoder is not None, "start_worker is the pool's initializer"
    return _encoder(rows)


def _exit_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
