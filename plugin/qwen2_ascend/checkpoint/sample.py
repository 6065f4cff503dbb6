"""A few bytes of a checkpoint's tensors, which tell it from another in which they have changed.

Every step of a training changes some of them; to read all would take minutes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import xxhash

from qwen2_ascend.checkpoint.plan import StoredSlice
from qwen2_ascend.files import open_regular, reading

MOST_TENSORS, MOST_BYTES = 512, 4096
"""So many tensors are looked at, and so much of the beginning of each."""


def sample_of(held: Iterable[StoredSlice]) -> dict[str, str]:
    """Hashes of how tensors are stored (`stored_as`), and of bytes of theirs (`values`).

    `may_be_same` compares them.

    Raises:
        UserError: a file cannot be read.
    """
    ordered = sorted(held, key=lambda one: (one.name, repr(one.piece.box)))
    listed = [(one.name, one.piece.box, one.stored.dtype) for one in ordered]
    # not every n-th: layers have the same tensors in the same order
    ordered.sort(key=lambda one: xxhash.xxh3_64_intdigest(one.name.encode()))
    values = xxhash.xxh3_64()
    for one in ordered[:MOST_TENSORS]:
        with reading(one.stored.path), open_regular(one.stored.path) as file:
            file.seek(one.stored.offset)
            values.update(file.read(min(one.stored.num_bytes, MOST_BYTES)))
    stored_as = xxhash.xxh3_64_hexdigest(repr(listed).encode())
    return {"stored_as": stored_as, "values": values.hexdigest()}


def may_be_same(was: Mapping[str, str], now: Mapping[str, str]) -> bool:
    """Whether two samples can be of the same weights.

    In another format or layout the same weights have other bytes in these places; that says
    nothing.
    """
    return was["stored_as"] != now["stored_as"] or was["values"] == now["values"]
