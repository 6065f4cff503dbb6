"""Converts a checkpoint: open, plan, check, write beside, verify, publish. No torch.

The steps before `_write` read headers only. From there on the target folder is either untouched or
replaced whole.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import xxhash

from qwen2_ascend.checkpoint.adapter import Adapter
from qwen2_ascend.checkpoint.casting import CastLosses
from qwen2_ascend.checkpoint.copying import Reader, SourceChecks
from qwen2_ascend.checkpoint.formats.hugging_face import INDEX_FILE
from qwen2_ascend.checkpoint.formats.megatron import MANIFEST_FILE, TRACKER_FILE
from qwen2_ascend.checkpoint.lora_source import GivenLora, open_lora
from qwen2_ascend.checkpoint.manifest import (
    MARK,
    Comparison,
    compare_with_manifest,
    encode_manifest,
    source_identity,
)
from qwen2_ascend.checkpoint.merging import MergingReader
from qwen2_ascend.checkpoint.plan import Plan, check_all_used, make_plan, overlap, volume
from qwen2_ascend.checkpoint.readers.base import Source
from qwen2_ascend.checkpoint.source import open_source, target_dtype
from qwen2_ascend.checkpoint.staging import StagedFolder, fsync_tree, partial_folder
from qwen2_ascend.checkpoint.target import (
    Target,
    check_files,
    hugging_face_target,
    megatron_target,
)
from qwen2_ascend.checkpoint.verify import check_base, check_replicas, verify
from qwen2_ascend.checkpoint.writing import JOURNAL_FILE, Journal, write_target
from qwen2_ascend.errors import UserError, VerificationError, raise_if
from qwen2_ascend.files import links_out, read_bytes, write_file
from qwen2_ascend.machine import num_cores
from qwen2_ascend.parallel import ParallelLayout, padded_vocab_size
from qwen2_ascend.progress import Progress

logger = logging.getLogger(__name__)

SPACE_MARGIN_BYTES = 64 << 20
MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """One conversion, as asked for; see the command's flags for their meaning."""

    load_dir: Path
    save_dir: Path
    load_model_type: str | None = None
    save_model_type: str
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    adapter: Path | None = None
    lora: GivenLora = field(default_factory=GivenLora)
    """What flags say of the adapter."""
    hf_cfg_dir: Path | None = None
    save_format: str | None = None
    """The format of shards; by default megatron."""
    padded_vocab_size: int | None = None
    make_vocab_size_divisible_by: int | None = None
    dtype: str | None = None
    max_shard_bytes: int | None = None
    """The largest file of a Hugging Face folder; by default MAX_SHARD_BYTES."""
    workers: int = 0
    """Threads; 0 takes one per core, at most 8."""
    verify: bool = False
    resume: bool = False
    overwrite: bool = False
    ignore_replica_mismatch: bool = False
    check_source: bool = True
    allow_overflow: bool = False


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """A conversion of which everything is known and checked, before its first byte."""

    request: Conversion
    source: Source
    adapter: Adapter | None
    """What is merged into the weights."""
    target: Target
    plan: Plan
    padded_vocab_size: int | None
    """None for a Hugging Face target, which is never padded."""
    comparison: Comparison
    """What the source's manifest says of it."""
    stamps: Mapping[str, tuple[int, int]]
    """Size in bytes and modification time of each source file, when its header was read."""


def prepare(request: Conversion) -> ConversionPlan:
    """Opens the source, lays out the target and plans the copying; reads headers only.

    Raises:
        UserError: whatever does not fit.
    """
    raise_if(_request_faults(request))
    source = open_source(request.load_dir, request.load_model_type, request.hf_cfg_dir)
    raise_if(links_out(request.load_dir, _read_paths(request.load_dir, source)))
    adapter = None
    if request.adapter:
        adapter = open_lora(request.adapter, source.config, request.lora)
    stamps = _stamps(source, adapter)
    comparison = Comparison()
    if request.check_source:
        comparison = compare_with_manifest(source, own_config=request.hf_cfg_dir is None)
    dtype = target_dtype(source, request.dtype)
    padded = None
    if request.save_model_type == "hf":
        target = hugging_face_target(
            source.config,
            dtype,
            request.max_shard_bytes or MAX_SHARD_BYTES,
            source.side_files,
            MARK,
        )
    else:
        if request.padded_vocab_size is None and request.make_vocab_size_divisible_by is None:
            request.layout.check(source.config)  # padding helps only where nothing else is wrong
        padded = padded_vocab_size(
            source.config,
            request.layout.tp,
            size=request.padded_vocab_size,
            divisible_by=request.make_vocab_size_divisible_by,
        )
        request.layout.check(source.config, padded)
        target = megatron_target(
            source.config,
            request.layout,
            padded,
            dtype,
            request.save_format or "megatron",
            source.side_files,
            MARK,
        )
    check_files(target)
    plan = make_plan(source.held, target.held, source.config.vocab_size)
    check_all_used(plan, source.held, source.config.vocab_size)
    return ConversionPlan(
        request=request,
        source=source,
        adapter=adapter,
        target=target,
        plan=plan,
        padded_vocab_size=padded,
        comparison=comparison,
        stamps=stamps,
    )


def to_hugging_face(
    load_dir: Path,
    save_dir: Path,
    *,
    adapter: Path | None = None,
    dtype: str | None = None,
    also: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Makes a Hugging Face folder of a checkpoint of any kind, verified.

    What a killed call left unfinished beside the folder is begun again.

    Args:
        load_dir: the checkpoint.
        save_dir: a new folder.
        adapter: a PEFT folder to merge on the way.
        dtype: of the weights; by default the checkpoint's own.
        also: contents of other files to write, by name.

    Raises:
        UserError: whatever does not fit.
    """
    request = Conversion(
        load_dir=load_dir,
        save_dir=save_dir,
        save_model_type="hf",
        adapter=adapter,
        dtype=dtype,
        verify=True,
        overwrite=not save_dir.is_dir() or not any(save_dir.iterdir()),
    )
    prepared = prepare(request)
    small = {**prepared.target.small_files, **{Path(name): data for name, data in also.items()}}
    convert(replace(prepared, target=replace(prepared.target, small_files=small)))


def convert(prepared: ConversionPlan) -> None:
    """Carries a prepared conversion out.

    Args:
        prepared: from `prepare`.

    Raises:
        UserError: the target is in the way, the disk too small, or the source inconsistent.
        OSError: reading or writing failed; the target is as it was.
        VerificationError: the result is not what it should be; the target is as it was.
    """
    request = prepared.request
    staged = StagedFolder(request.save_dir, resume=request.resume, overwrite=request.overwrite)
    if not request.ignore_replica_mismatch:
        check_replicas(prepared.plan.replicas)
    if prepared.adapter is not None:
        check_base(prepared.source, prepared.adapter)
    for remark in _not_checked(prepared):
        logger.info(f"source: {remark}")
    begun = False
    try:
        with staged:
            begun = True
            _check_space(prepared, staged.folder)
            _write(prepared, staged)
            if request.verify:
                _verify(prepared, staged)
            with _journal_set_aside(staged.folder):
                staged.publish()
    except BaseException:
        if begun and staged.folder.is_dir():
            flags = "--resume --overwrite" if request.overwrite else "--resume"
            logger.info(
                f"what is written so far stays in {staged.folder}; finish it by repeating the "
                f"command with {flags}, or remove that folder"
            )
        raise
    logger.info(f"written: {request.save_dir}")


def _read_paths(folder: Path, source: Source) -> Iterator[Path]:
    """What is read of a source besides its side files."""
    if source.kind == "hf":
        yield from source.files
        yield folder / INDEX_FILE
    else:
        yield source.folder
        yield folder / TRACKER_FILE


def _not_checked(prepared: ConversionPlan) -> Iterator[str]:
    """What a reader of the log might think was checked, and was not."""
    request = prepared.request
    for remark in prepared.comparison.remarks:
        yield f"{remark}; that is not verified"
    if request.verify and not prepared.comparison.parts and not prepared.comparison.remarks:
        yield "it has no manifest; whether its bytes are as they were written is not verified"


@contextlib.contextmanager
def _journal_set_aside(folder: Path) -> Iterator[None]:
    """Removes the journal, which is no part of the result, but not if the result is refused."""
    path = folder / JOURNAL_FILE
    journal = read_bytes(path)
    path.unlink()
    try:
        yield
    except BaseException:
        if folder.is_dir():
            path.write_bytes(journal)
        raise


def plan_rows(prepared: ConversionPlan) -> list[tuple[str, ...]]:
    """The plan as a table: file, tensor, shape, dtype, how it is copied, from what."""
    rows = []
    factors = prepared.adapter.factors if prepared.adapter else ()
    for write in prepared.plan.writes:
        piece, stored = write.target.piece, write.target.stored
        how = ["columns" if write.is_strided else "rows"]
        how += ["cast"] if write.casts else []
        how += ["zeros"] if write.is_padded else []
        merged = (one.box for one in factors if one.tensor == piece.tensor)
        how += ["merge"] if any(volume(overlap(box, piece.box)) for box in merged) else []
        sources = ", ".join(
            f"{copy.source.stored.path.relative_to(prepared.source.folder)}:{copy.source.name}"
            for copy in write.copies
        )
        rows.append(
            (
                str(stored.path),
                write.target.name,
                "x".join(map(str, stored.shape)),
                stored.dtype,
                "+".join(how),
                sources or "-",
            )
        )
    return rows


def _write(prepared: ConversionPlan, staged: StagedFolder) -> None:
    request, source, target = prepared.request, prepared.source, prepared.target
    journal = Journal(staged.folder, _identity(prepared), resume=staged.is_resumed)
    if journal.done:
        num_done, num_writes = len(journal.done), len(prepared.plan.writes)
        logger.info(f"resuming: {num_done} of {num_writes} tensors are there")
    try:
        way_out = " --no-check-source takes it as it is."
        checks = SourceChecks(prepared.comparison.parts, way_out)
        losses = CastLosses(
            " --dtype chooses; --allow-overflow writes them as infinite.",
            allow_overflow=request.allow_overflow,
        )
        with Progress("write", prepared.plan.num_bytes) as progress:
            checksums = write_target(
                staged.folder,
                target,
                prepared.plan,
                journal,
                workers=_workers(request),
                progress=progress,
                open_reader=_open_reader(prepared, losses),
                checks=checks,
            )
    finally:
        journal.close()
    for remark in losses.remarks():
        logger.info(f"cast: {remark}")
    if _stamps(source, prepared.adapter) != prepared.stamps:
        raise VerificationError(
            f"{source.folder}: changed while it was read; convert it when it is at rest."
        )
    with Reader() as reader:
        checks.finish(source.held, reader)
    if n := len(prepared.comparison.parts):
        files = prepared.comparison.num_files
        logger.info(
            f"source: {n} tensors have the checksums they were written with, {files} files too"
        )
    for path, data in target.small_files.items():
        write_file(staged.folder / path, data)
    layout = request.layout if target.kind == "mg" else None
    manifest = encode_manifest(
        source,
        target,
        layout,
        prepared.padded_vocab_size,
        checksums,
        prepared.adapter.folder.resolve().name if prepared.adapter else None,
    )
    write_file(staged.folder / MANIFEST_FILE, manifest)
    if target.tracker is not None:
        fsync_tree(staged.folder)
        write_file(staged.folder / target.tracker[0], target.tracker[1])


def _verify(prepared: ConversionPlan, staged: StagedFolder) -> None:
    written = open_source(staged.folder, prepared.target.kind)
    try:
        comparison = compare_with_manifest(written)
    except UserError as error:
        raise VerificationError(str(error)) from None
    with Progress("verify", prepared.plan.num_bytes) as progress:
        verify(
            prepared.source,
            written,
            checksums=comparison.checksums,
            workers=_workers(prepared.request),
            progress=progress,
            # what the casts lose was refused or said while writing
            open_reader=_open_reader(prepared, CastLosses(allow_overflow=True)),
        )
    merged = "" if prepared.adapter is None else " merged with the adapter"
    logger.info(f"verified: every byte was read back and equals the source{merged}")


def _open_reader(prepared: ConversionPlan, losses: CastLosses) -> Callable[[], Reader]:
    if prepared.adapter is None:
        return partial(Reader, losses)
    return partial(MergingReader, prepared.adapter, losses)


def _identity(prepared: ConversionPlan) -> Mapping[str, object]:
    """What must be equal for an unfinished conversion to be finished by this one."""
    small = prepared.target.small_files
    return {
        "source": source_identity(prepared.source),
        "stamps": prepared.stamps,
        "adapter": asdict(prepared.adapter.lora) if prepared.adapter else None,
        "scalings": [one.scaling for one in prepared.adapter.factors] if prepared.adapter else None,
        "target": [prepared.target.kind, prepared.target.format],
        "layout": asdict(prepared.request.layout),
        "padded_vocab_size": prepared.padded_vocab_size,
        "sizes": {str(path): file.total_bytes for path, file in prepared.target.files.items()},
        "dtypes": sorted({held.stored.dtype for held in prepared.target.held}),
        "small_files": {str(path): xxhash.xxh3_128_hexdigest(small[path]) for path in small},
    }


def _stamps(source: Source, adapter: Adapter | None) -> dict[str, tuple[int, int]]:
    files = (*source.files, *(adapter.files if adapter else ()))
    stats = {path: path.stat() for path in files}
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def _workers(request: Conversion) -> int:
    return request.workers or min(8, num_cores())


def _request_faults(request: Conversion) -> Iterator[str]:
    """What can be said before anything is opened."""
    if request.lora.flags and request.adapter is None:
        yield (
            f"{', '.join(request.lora.flags)}: name the LoRA checkpoint with --lora-load; "
            "--load-dir is the model that it was trained on."
        )
    if request.verify and not request.check_source:
        yield "--verify checks the source too; leave out --no-check-source."
    if request.save_model_type == "mg" and request.max_shard_bytes is not None:
        yield "--max-shard-size: for a Hugging Face folder only; leave out with shards."
    if request.save_model_type == "hf":
        shard_flags = {
            # a Hugging Face folder's files are safetensors, too
            f"--save-format {request.save_format}": (
                request.save_format not in (None, "safetensors")
            ),
            "--target-tensor-parallel-size": request.layout.tp != 1,
            "--target-pipeline-parallel-size": request.layout.pp != 1,
            "--num-layers-per-virtual-pipeline-stage": (
                request.layout.num_layers_per_virtual_pipeline_stage is not None
            ),
            "--num-layer-list": request.layout.num_layer_list is not None,
            "--padded-vocab-size": request.padded_vocab_size is not None,
            "--make-vocab-size-divisible-by": request.make_vocab_size_divisible_by is not None,
        }
        if given := [flag for flag, is_given in shard_flags.items() if is_given]:
            yield f"{', '.join(given)}: for shards only; leave out with --save-model-type hf."
    save, load = _real(request.save_dir), _real(request.load_dir)
    if load == save or load in save.parents or save in load.parents:
        yield (
            f"--save-dir {request.save_dir} and --load-dir {request.load_dir} lie in each other; "
            "choose a folder outside the source, which is never touched."
        )
    read = {
        "--load-dir": request.load_dir,
        "--adapter": request.adapter,
        "--hf-cfg-dir": request.hf_cfg_dir,
    }
    for flag, folder in read.items():
        for written in (save, partial_folder(save)):
            if folder is not None and written in (real := _real(folder), *real.parents):
                yield f"{flag} {folder} lies where the result is written; choose another --save-dir"


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _check_space(prepared: ConversionPlan, folder: Path) -> None:
    there = sum(
        entry.stat().st_blocks * 512 for entry in folder.rglob("*") if entry.is_file()
    )  # of an unfinished run
    needed = prepared.target.total_bytes + SPACE_MARGIN_BYTES - there
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{prepared.request.save_dir}: needs {needed / 1e9:.2f} GB, but the disk has "
            f"{free / 1e9:.2f} GB free; make room or choose another --save-dir."
        )
