"""The manifest of a checkpoint: what is in it, with a checksum for every tensor and file.

It is written beside the weights and never read from what it describes. So a later conversion can
hold against it what the files' own headers say (names, dtypes, shapes, offsets), and the bytes.
"""

from __future__ import annotations

import json
import os
import re
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from qwen2_ascend import __version__
from qwen2_ascend.checkpoint.formats import megatron_optimizer, safetensors, torch_dist, torch_pt
from qwen2_ascend.checkpoint.formats.megatron import MANIFEST_FILE
from qwen2_ascend.checkpoint.formats.stored import StoredTensor, TensorSpec
from qwen2_ascend.checkpoint.manifest_form import VERSION, Entry, Manifest, read_manifest
from qwen2_ascend.checkpoint.plan import StoredSlice
from qwen2_ascend.checkpoint.readers.base import Source
from qwen2_ascend.checkpoint.target import Target
from qwen2_ascend.checkpoint.writing import Checksums
from qwen2_ascend.errors import DamagedError, UserError, at_most
from qwen2_ascend.files import open_regular, regular_files
from qwen2_ascend.parallel import ParallelLayout

MARK = {"qwen2_ascend_manifest": MANIFEST_FILE}
"""What the weights' own files say: a manifest that was lost is missed, and one that describes what
a training run has replaced is not held against the new files."""

_PART = re.compile(r"\[[0-9]+:[0-9]+\]$")
"""What a part's name has behind the tensor's."""
_BESIDES = ("optimizer.", f"{megatron_optimizer.KEY}/", "rng_state/")
"""How the names of what is no weight begin, in torch_dist and in the mp_rank tree."""


# -- writing


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
    tensors: dict[str, dict[str, Any]] = defaultdict(dict)
    for held in target.held:
        path, stored = str(held.stored.path), held.stored
        tensors[path][held.name] = {
            "dtype": stored.dtype,
            "shape": list(stored.shape),
            "offset": stored.offset,
            "xxh3_128": checksums[path, held.name],
        }
    small = {str(path): data for path, data in target.small_files.items()}
    for path, file in target.files.items():  # those of a torch_dist folder that hold no tensors
        if str(path) not in tensors:
            small[str(path)] = b"".join(data for _, data in file.segments)
    listed = {
        "format": target.format,
        "layout": asdict(layout) if layout else None,
        "padded_vocab_size": padded_vocab_size,
        "config": asdict(source.config),
        "source": source_identity(source),
        "adapter": adapter,
        "sizes": {str(path): file.total_bytes for path, file in target.files.items()},
        "files": {path: xxhash.xxh3_128_hexdigest(data) for path, data in small.items()},
        "tensors": tensors,
    }
    return _encoded(target.kind, listed)


def encode_training_manifest(
    folder: Path,
    *,
    about: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Any]],
    checksums: Mapping[str, str],
    beside: Mapping[Path, bytes],
) -> bytes:
    """The manifest of an iteration that is complete but for it.

    Args:
        folder: the iteration's.
        about: the run: plain values by key, which nothing reads.
        tensors: by file and name what the file holds, as in `encode_manifest`; a tensor that ranks
            wrote together has a name for each part, `NAME[start:stop]` in elements.
        checksums: of whole files, where they are known already.
        beside: what lies in the folder above, by its place there.
    """
    sizes, files = {}, {}
    for path in regular_files(folder):
        name = _place(path, folder)
        if name in tensors:
            sizes[name] = path.stat().st_size
        else:
            files[name] = checksums.get(name) or file_checksum(path)
    listed = {
        **about,
        "sizes": sizes,
        "files": files,
        "beside": {str(path): xxhash.xxh3_128_hexdigest(data) for path, data in beside.items()},
        "tensors": tensors,
    }
    return _encoded("training", listed)


def _encoded(kind: str, listed: Mapping[str, Any]) -> bytes:
    start = {"manifest_version": VERSION, "written_by": f"qwen2-ascend {__version__}"}
    return (json.dumps({**start, "kind": kind, **listed}, indent=1) + "\n").encode()


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


# -- reading


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What came of holding a source against its manifest."""

    parts: Mapping[StoredTensor, tuple[tuple[StoredTensor, str], ...]] = field(default_factory=dict)
    """What each tensor's bytes must have, in the parts that it was written in."""
    num_files: int = 0
    """Small files that are as they were written."""
    remarks: tuple[str, ...] = ()
    """What could not be compared, one sentence each."""

    @property
    def checksums(self) -> dict[StoredTensor, str]:
        """Checksums of the tensors that were written in one part."""
        return {stored: parts[0][1] for stored, parts in self.parts.items() if len(parts) == 1}


def compare_with_manifest(
    source: Source, *, own_config: bool = True, is_whole: bool = True
) -> Comparison:
    """Holds what was read of a source's headers, and its small files, against its manifest.

    Files that came later (a training run that went on in the same folder) are not in the manifest
    and not compared.

    Args:
        source: opened.
        own_config: whether config.json and the tokenizer lie with the weights; not those that the
            user named elsewhere.
        is_whole: whether `source` is all weights that the manifest lists; else it is the
            optimizer's tensors of one kind, and small files are not looked at.

    Raises:
        DamagedError: everything that is not as the manifest says, or a manifest that is damaged.
    """
    manifest = _find(source)
    if manifest is None:
        lost = f"its {MANIFEST_FILE}, which was written with it, is missing"
        remarks = (lost,) if _is_marked(source) else ()
        return Comparison(remarks=remarks)
    read: dict[str, dict[str, StoredSlice]] = defaultdict(dict)
    for held in source.held:
        read[_place(held.stored.path, manifest.folder)][held.name] = held
    listed = {file: tensors for file, tensors in read.items() if file in manifest.tensors}
    unlisted = len(source.held) - sum(map(len, listed.values()))
    remarks = [f"its manifest lists nothing of {unlisted} tensors"] if unlisted else []
    if not listed:  # of an earlier iteration, or emptied
        return Comparison(remarks=tuple(remarks))
    if manifest.is_replaceable and not _is_marked(source):
        return Comparison(remarks=("its manifest is of other weights, which were replaced",))
    entries = {file: _by_tensor(manifest.tensors[file]) for file in listed}
    faults = list(_faults(manifest, listed, entries))
    files: list[str] = []
    if is_whole:
        files, unlisted_files = _small_files(source, manifest, own_config)
        remarks += unlisted_files
        faults += _unread(source, manifest, listed, entries)
        faults += (fault for file in files for fault in _changed(manifest, file))
    _raise_damaged(faults)
    return Comparison(
        parts={
            held.stored: tuple(
                (StoredTensor(held.stored.path, offset, shape, dtype), checksum)
                for dtype, shape, offset, checksum in entries[file][name]
            )
            for file, tensors in listed.items()
            for name, held in tensors.items()
        },
        num_files=len(files),
        remarks=tuple(remarks),
    )


def _find(source: Source) -> Manifest | None:
    folder = Path(os.path.abspath(source.folder))
    # of shards it lies beside the iterations
    places = (folder, folder.parent) if source.kind == "mg" else (folder,)
    path = next((p / MANIFEST_FILE for p in places if os.path.lexists(p / MANIFEST_FILE)), None)
    return None if path is None else read_manifest(path)


def _is_marked(source: Source) -> bool:
    """Whether the files say that they were written with a manifest."""
    first = source.files[0]
    if source.format == "safetensors":
        return safetensors.read_header(first).metadata.items() >= MARK.items()
    is_torch_dist = source.format == "torch_dist"
    state = torch_dist.read_common(source.folder) if is_torch_dist else torch_pt.read(first)
    args = state.get("args")
    return isinstance(args, Namespace) and vars(args).items() >= MARK.items()


def check_iteration(
    folder: Path, *, share: int = 0, num_shares: int = 1, most_bytes: int | None = None
) -> Manifest | None:
    """Holds a training checkpoint, but for its tensors' bytes, against its manifest.

    That is the sizes of files of tensors, and the contents of all others.

    Args:
        folder: the iteration's.
        share: which of the shares of the files is read.
        num_shares: among as many the files are dealt.
        most_bytes: larger files are not read.

    Returns:
        The manifest, or None where there is none.

    Raises:
        DamagedError: everything that is not as it was written.
    """
    if not (folder / MANIFEST_FILE).is_file():
        return None
    try:
        manifest = read_manifest(folder / MANIFEST_FILE)
    except UserError as error:
        raise DamagedError(error.faults) from None
    own = list(manifest.files or ())[share::num_shares]
    faults = [f for file in own for f in _changed(manifest, file, most_bytes)]
    for file, said in manifest.sizes.items():
        path = folder / file
        size = path.stat().st_size if path.is_file() else None
        if size != said:
            what = "is missing" if size is None else f"has {size} bytes"
            faults.append(f"{path}: {what}; it was written with {said}.")
    for file, expected in manifest.beside.items():
        above = replace(manifest, folder=folder.parent, files={file: expected})
        faults += _changed(above, file)
    _raise_damaged(faults)
    return manifest


def _raise_damaged(faults: list[str]) -> None:
    if faults:
        raise DamagedError(at_most(faults))


def _by_tensor(entries: Mapping[str, Entry]) -> dict[str, list[Entry]]:
    """The entries of every tensor, in the order of its parts."""
    found: dict[str, list[Entry]] = defaultdict(list)
    for name, entry in entries.items():
        found[_PART.sub("", name)].append(entry)
    return {name: sorted(parts, key=lambda entry: entry.offset) for name, parts in found.items()}


def _faults(
    manifest: Manifest,
    listed: Mapping[str, Mapping[str, StoredSlice]],
    entries: Mapping[str, Mapping[str, list[Entry]]],
) -> Iterator[str]:
    """What the headers say otherwise than the manifest, in the files that both know."""
    for file, tensors in listed.items():
        path = manifest.folder / file
        size, said = path.stat().st_size, manifest.sizes.get(file)
        if size != said:
            yield f"{path}: has {size} bytes; the manifest says {said}. The file is damaged."
        for name, held in sorted(tensors.items()):
            parts = entries[file].get(name)
            if parts is None:
                yield f"{path}: holds {name}, which the manifest does not list there; damaged."
            elif fault := _tensor_fault(held.stored, parts):
                yield f"{path}: {name} {fault} The file is damaged."


def _tensor_fault(stored: StoredTensor, parts: list[Entry]) -> str | None:
    """How a tensor is not what was written, in one part or in several."""
    _, offset, shape, dtype = stored
    end = offset
    for part in parts:
        if (part.offset, part.dtype) != (end, dtype):
            break
        end += TensorSpec(part.shape, dtype).num_bytes
    is_equal = end == offset + stored.num_bytes and (len(parts) > 1 or parts[0].shape == shape)
    if is_equal:
        return None
    said = "; ".join(f"{p.shape} {p.dtype} at byte {p.offset}" for p in parts[:3])
    return f"is {shape} {dtype} at byte {offset}; the manifest says {said}."


def _unread(
    source: Source,
    manifest: Manifest,
    listed: Mapping[str, Mapping[str, StoredSlice]],
    entries: Mapping[str, Mapping[str, list[Entry]]],
) -> Iterator[str]:
    """What the manifest lists and the headers do not, of the weights."""
    for file, tensors in manifest.tensors.items():
        path = manifest.folder / file
        is_all_besides = all(name.startswith(_BESIDES) for name in tensors)
        if file not in listed and not is_all_besides and _is_below(path, source.folder):
            yield f"{path}: the manifest lists it, but nothing was found in it."
    for file, names in entries.items():
        for name in names.keys() - listed[file].keys():
            if not name.startswith(_BESIDES):
                yield f"{manifest.folder / file}: lacks {name}, which the manifest lists there."


def _small_files(
    source: Source, manifest: Manifest, own_config: bool
) -> tuple[list[str], list[str]]:
    """Those of the manifest's small files that belong to what is read; what is not listed."""
    if manifest.files is None:
        return [], ["its manifest, of an earlier release, lists no config and tokenizer files"]
    inner = (file for path in source.side_files for file in regular_files(path))
    own = [_place(path, manifest.folder) for path in inner]
    with_weights = own_config and os.path.dirname(own[0]) == ""
    files = [
        file
        for file in manifest.files
        if _is_below(manifest.folder / file, source.folder)
        or (with_weights and not file.startswith("iter_"))
    ]
    unlisted = [file for file in own if with_weights and file not in manifest.files]
    return files, [f"its manifest does not list {', '.join(unlisted)}"] if unlisted else []


def _changed(manifest: Manifest, file: str, most_bytes: int | None = None) -> Iterator[str]:
    """Whether a file is not the one that was written, if it is not longer than `most_bytes`."""
    assert manifest.files is not None
    path = manifest.folder / file
    try:
        if most_bytes is not None and path.stat().st_size > most_bytes:
            return
        found = file_checksum(path)
    except FileNotFoundError:
        yield (
            f"{path}: is missing, but was written with the weights; put it back. If you removed "
            f"it, name its folder: --hf-cfg-dir {path.parent}."
        )
        return
    if found != manifest.files[file]:
        yield (
            f"{path}: is not the file that was written with the weights. If you changed it, name "
            f"its folder: --hf-cfg-dir {path.parent}; if not, it is damaged."
        )


def file_checksum(path: Path) -> str:
    """The xxh3-128 checksum of a regular file, in hexadecimal.

    Raises:
        UserError: it is none.
        OSError: it cannot be read.
    """
    checksum, band = xxhash.xxh3_128(), bytearray(1 << 20)
    with open_regular(path) as file:
        while count := file.readinto(band):  # pyright: ignore[reportAttributeAccessIssue]
            checksum.update(memoryview(band)[:count])
    return checksum.hexdigest()


def _place(path: Path, folder: Path) -> str:
    return os.path.relpath(os.path.abspath(path), folder)


def _is_below(path: Path, folder: Path) -> bool:
    return path.is_relative_to(os.path.abspath(folder))
