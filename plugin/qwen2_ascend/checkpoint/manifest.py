"""The manifest of a converted checkpoint: what is in it, with a checksum for every tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen2_ascend import __version__
from qwen2_ascend.checkpoint.copying import stored_checksum
from qwen2_ascend.checkpoint.formats.megatron import MANIFEST_FILE
from qwen2_ascend.checkpoint.formats.stored import StoredTensor
from qwen2_ascend.checkpoint.source import Source
from qwen2_ascend.checkpoint.target import Target
from qwen2_ascend.checkpoint.writing import Checksums
from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.parallel import ParallelLayout


def encode_manifest(
    source: Source,
    target: Target,
    layout: ParallelLayout | None,
    padded_vocab_size: int | None,
    checksums: Checksums,
    adapter: str | None = None,
) -> bytes:
    """The manifest's contents; `adapter` is the name of one that was merged.

    Names are relative to the folder; no path of this machine.
    """
    files: dict[str, dict[str, Any]] = {}
    for held in target.held:
        path, stored = str(held.stored.path), held.stored
        files.setdefault(path, {})[held.name] = {
            "dtype": stored.dtype,
            "shape": list(stored.shape),
            "offset": stored.offset,
            "xxh3_128": checksums[path, held.name],
        }
    manifest = {
        "manifest_version": 1,
        "written_by": f"qwen2-ascend {__version__}",
        "kind": target.kind,
        "format": target.format,
        "layout": asdict(layout) if layout else None,
        "padded_vocab_size": padded_vocab_size,
        "config": asdict(source.config),
        "source": source_identity(source),
        "adapter": adapter,
        "sizes": {str(file.path): file.total_bytes for file in target.files},
        "tensors": files,
    }
    return (json.dumps(manifest, indent=1) + "\n").encode()


def source_identity(source: Source) -> dict[str, Any]:
    """What a source was: its kind and its weight files with their sizes."""
    return {
        "kind": source.kind,
        "format": source.format,
        "name": source.folder.resolve().name,
        "files": {
            str(path.relative_to(source.folder)): path.stat().st_size for path in source.files
        },
    }


def check_against_manifest(source: Source, *, workers: int) -> int:
    """Reads every tensor of a source that its manifest lists and compares checksums.

    Files that came later (a training run that went on in the same folder) are not in the manifest
    and not compared.

    Returns:
        The number of tensors compared; 0 where there is no manifest.

    Raises:
        UserError: tensors whose bytes changed since they were written, all named.
    """
    places = (source.folder, source.folder.parent)  # shards: the folder of the iterations
    path = next((p / MANIFEST_FILE for p in places if (p / MANIFEST_FILE).is_file()), None)
    if path is None:
        return 0
    entries = [entry for entry in _entries(path) if entry[1].path in set(source.files)]
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda entry: stored_checksum(entry[1]), entries)
        raise_if(
            f"{stored.path}: {name} does not have the checksum it was written with; the file is "
            "damaged or was changed."
            for (name, stored, expected), checksum in zip(entries, found, strict=True)
            if checksum != expected
        )
    return len(entries)


def _entries(path: Path) -> list[tuple[str, StoredTensor, str]]:
    """(name, where it lies, checksum) of every tensor that a manifest lists."""
    try:
        files: Mapping[str, Mapping[str, Any]] = json.loads(path.read_bytes())["tensors"]
        return [
            (
                name,
                StoredTensor(
                    path.parent / file, entry["offset"], tuple(entry["shape"]), entry["dtype"]
                ),
                entry["xxh3_128"],
            )
            for file, tensors in files.items()
            for name, entry in tensors.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a manifest of qwen2-ascend: {error!r}") from None
