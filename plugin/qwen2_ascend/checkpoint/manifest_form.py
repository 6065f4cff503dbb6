"""What a manifest lists, and the form of its file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from qwen2_ascend.checkpoint.formats.stored import NUMPY_DTYPES, is_shape, is_size
from qwen2_ascend.errors import UserError, raise_if, shown
from qwen2_ascend.files import parse_json, read_bytes, reading

VERSION = 2
"""2 lists small files, which 1 did not."""
_MOST_FAULTS = 20
_READ_ON = "--no-check-source reads it all the same"


class Entry(NamedTuple):
    """One tensor as the manifest lists it."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    checksum: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a manifest lists; files by their place below `folder`."""

    folder: Path
    tensors: Mapping[str, Mapping[str, Entry]]
    """By file and name."""
    sizes: Mapping[str, int]
    """Bytes of each weight file."""
    files: Mapping[str, str] | None
    """Checksums of the small files; None where an earlier release did not list them."""
    beside: Mapping[str, str] = field(default_factory=dict)
    """Checksums of files in the folder above: a run's config.json and tokenizer."""
    is_replaceable: bool = False
    """Whether other weights may have come into its place: it did not appear at once with them."""


def read_manifest(path: Path) -> Manifest:
    """Reads a manifest.

    Raises:
        UserError: it is none; every fault at once.
    """
    with reading(path):
        data = read_bytes(path)
    try:
        raw = parse_json(data)
    except UserError as error:
        raise UserError(f"{path}: not a manifest of qwen2-ascend: {error}") from None
    version = raw.get("manifest_version") if isinstance(raw, dict) else None
    if type(version) is int and version > VERSION:
        raise UserError(
            f"{path}: manifest_version={version} is of a newer release of qwen2-ascend; this one "
            f"reads up to {VERSION}. {_READ_ON}."
        )
    checksums = _Each(_is_path, _is_checksum)
    form = _FORM | ({"files": checksums} if version == 2 else {})
    form |= {"beside": checksums} if isinstance(raw, dict) and "beside" in raw else {}
    faults = list(_form_faults(raw, form, "")) or list(_omissions(raw))
    raise_if(f"{path}: not a manifest of qwen2-ascend: {fault}." for fault in faults[:_MOST_FAULTS])
    tensors = {
        file: {
            name: Entry(e["dtype"], tuple(e["shape"]), e["offset"], e["xxh3_128"])
            for name, e in entries.items()
        }
        for file, entries in raw["tensors"].items()
    }
    return Manifest(
        folder=path.parent,
        tensors=tensors,
        sizes=raw["sizes"],
        files=raw.get("files"),
        beside=raw.get("beside", {}),
        is_replaceable="files" in raw and "beside" not in raw,
    )


def _omissions(raw: Mapping[str, Any]) -> Iterator[str]:
    """Weight files of which it lists no tensor: a manifest that was emptied."""
    if "files" in raw:
        for file in raw["sizes"]:
            if not raw["tensors"].get(file) and file not in raw["files"]:
                yield f"it lists no tensor of {file}"


class _Each(NamedTuple):
    """The form of an object with keys of any number."""

    key: Callable[[Any], bool]
    value: Any


def _form_faults(value: Any, form: Any, where: str) -> Iterator[str]:
    """Where a JSON value lacks a form: a condition, keys with a form each, or _Each."""
    if callable(form):
        if not form(value):
            yield f"{where or 'it'} is {shown(value)}"
    elif not isinstance(value, dict):
        yield f"{where or 'it'} is {shown(value)}, not a JSON object"
    elif isinstance(form, _Each):
        for key, inner in value.items():
            if not form.key(key):
                yield f"{where} has the key {shown(key)}"
            yield from _form_faults(inner, form.value, f"{where}.{key}")
    else:
        for key, inner in form.items():
            if key in value:
                yield from _form_faults(value[key], inner, f"{where}.{key}".lstrip("."))
            else:
                yield f"{where or 'it'} has no {key}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and value in NUMPY_DTYPES


def _is_checksum(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 32 and set(value) <= set("0123456789abcdef")


def _is_path(value: Any) -> bool:
    """A file's place below the folder, written in one way only."""
    inside = value not in ("", ".") and "\0" not in value and not os.path.isabs(value)
    return inside and os.path.normpath(value) == value and not value.startswith("..")


_FORM = {
    "manifest_version": lambda value: type(value) is int and value in (1, VERSION),
    "written_by": _is_text,
    "sizes": _Each(_is_path, is_size),
    "tensors": _Each(
        _is_path,
        _Each(
            _is_text,
            {
                "dtype": _is_dtype,
                "shape": is_shape,
                "offset": is_size,
                "xxh3_128": _is_checksum,
            },
        ),
    ),
}
"""What is read of a manifest; the rest is for people."""
