"""`qwen2-ascend convert` and tools/convert_checkpoint.py; flags as in MindSpeed-LLM's converter."""

from __future__ import annotations

import logging
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from qwen2_ascend.checkpoint.convert import Conversion, convert, plan_rows, prepare
from qwen2_ascend.checkpoint.formats.peft_adapter import other_base
from qwen2_ascend.checkpoint.lora_source import GivenLora
from qwen2_ascend.checkpoint.pasted import (
    CONVERT_FLAGS,
    contradictions,
    merged_places,
    split_convert_flags,
)
from qwen2_ascend.checkpoint.source import find_weights
from qwen2_ascend.errors import UserError, printable, raise_if
from qwen2_ascend.flags import layer_list, number_faults
from qwen2_ascend.log import shown_log
from qwen2_ascend.markdown import aligned
from qwen2_ascend.parallel import ParallelLayout
from qwen2_ascend.pasted_flags import pasted_faults, pasted_notes
from qwen2_ascend.progress import size_text

if TYPE_CHECKING:
    from qwen2_ascend.checkpoint.convert import ConversionPlan

logger = logging.getLogger(__name__)

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Split a Hugging Face checkpoint into Megatron shards, merge shards back, or cut them anew.

    The source's format and layout are detected. The result is written beside --save-dir and
    renamed into place when complete, so --save-dir is never half.
    """

    load_dir: Path
    """Hugging Face folder, Megatron shards, or a training checkpoint."""
    save_dir: Path
    """Folder to write; must not exist, or be empty."""
    save_model_type: Literal["hf", "mg"] | None = None
    """What to write: Hugging Face or Megatron; when not said, the other than --load-dir holds."""
    load_model_type: Literal["hf", "mg"] | None = None
    """What --load-dir holds; detected when not said."""
    target_tensor_parallel_size: int = 1
    """Tensor-parallel ranks to cut for."""
    target_pipeline_parallel_size: int = 1
    """Pipeline stages to cut for."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers per chunk of an interleaved pipeline (VPP)."""
    num_layer_list: str | None = None
    """Layers of each stage when they are not equal, as 6,8,8,6."""
    adapter: Annotated[Path | None, tyro.conf.arg(aliases=["--lora-load"])] = None
    """LoRA adapter to merge into the weights on the way: a PEFT folder, or the checkpoint of a LoRA
    run, ours or MindSpeed-LLM's."""
    lora_r: int | None = None
    """The adapter's rank; it has to be so."""
    lora_alpha: float | None = None
    """The adapter's alpha; it has to be so. Where the checkpoint does not say it, this does."""
    lora_target_modules: tuple[str, ...] = ()
    """What the adapter adapts, in Megatron's or Hugging Face's names; it has to be so."""
    hf_cfg_dir: Path | None = None
    """Folder with config.json and tokenizer, when they are not beside the weights."""
    save_format: Literal["megatron", "safetensors", "torch_dist"] | None = None
    """Shards' format: mp_rank_*/model_optim_rng.pt (by default), the same tree as safetensors, or
    torch_dist."""
    padded_vocab_size: int | None = None
    """Pad the vocabulary to this many rows, with zeros; they are trimmed on the way back."""
    make_vocab_size_divisible_by: int | None = None
    """Pad it to a multiple of this times the tensor-parallel size (Megatron's default is 128)."""
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """Cast the weights; without it they are kept bit for bit."""
    allow_overflow: bool = False
    """Write numbers that are too large for --dtype as infinite, instead of refusing them."""
    max_shard_size: str | None = None
    """Largest safetensors file of a Hugging Face result; by default 5GB."""
    workers: int = 0
    """Threads; 0 takes one per core, at most 8."""
    dry_run: bool = False
    """Print the plan as a table and check it; write nothing."""
    verify: bool = False
    """Read the result back, every byte, against the source and its own new manifest."""
    resume: bool = False
    """Finish a conversion that was killed."""
    overwrite: bool = False
    """Replace a checkpoint in --save-dir; the old one stays until the new one is complete."""
    check_source: bool = True
    """Check what is read against the manifest beside it, if there is one (checksums too)."""
    ignore_replica_mismatch: bool = False
    """Accept tensors that ranks hold twice and differently; the first rank's is taken."""


@shown_log("stderr")
def main(argv: Sequence[str] | None = None) -> None:
    """Parses `argv` and converts."""
    words, pasted = split_convert_flags(sys.argv[1:] if argv is None else argv)
    raise_if(contradictions(sys.argv[1:] if argv is None else argv, pasted))
    options = tyro.cli(ConvertOptions, args=words)
    started = time.monotonic()
    raise_if(pasted_faults(pasted, CONVERT_FLAGS, options, None))
    # imported once the flags are right: --help answers sooner

    options = _with_kinds(options)
    placed = options
    if options.save_model_type == "hf":
        save, config = merged_places(options.save_dir, options.hf_cfg_dir, pasted)
        placed = replace(options, save_dir=save, hf_cfg_dir=config)
    prepared = prepare(_conversion(placed))
    raise_if(pasted_faults(pasted, CONVERT_FLAGS, options, prepared.source.config))
    for note in pasted_notes(pasted, CONVERT_FLAGS):
        logger.info(note)
    if placed.save_dir != options.save_dir:
        logger.info(f"{options.save_dir} stays as it is; the result is {placed.save_dir}")
    logger.info(f"from {prepared.source.describe()}")
    if (adapter := prepared.adapter) is not None:
        targets = ", ".join(adapter.lora.targets)
        logger.info(f"merging {adapter.folder}: LoRA of rank {adapter.lora.rank} on {targets}")
        base = other_base(adapter.folder, options.load_dir)
        if base is not None and prepared.source.kind == "hf":
            logger.info(
                f"the adapter says that it was trained on {base}; it is merged into another model"
            )
    if options.dry_run:
        _print_plan(prepared)
        return
    logger.info(
        f"to {prepared.target.format} in {len(prepared.target.files)} files, "
        f"{size_text(prepared.target.total_bytes)}"
    )
    convert(prepared)
    logger.info(f"done in {time.monotonic() - started:.1f} s")


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 2GiB.

    Raises:
        UserError: not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise UserError(f"--max-shard-size {text}: not a size; say for example 5GB or 500MB.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _with_kinds(options: ConvertOptions) -> ConvertOptions:
    """The options with what to write, which is the other kind where they do not say it.

    Raises:
        UserError: a format of shards is named, and the other kind is none.
    """
    if options.save_model_type is not None:
        return options

    loaded = options.load_model_type or find_weights(options.load_dir)[0]
    if loaded == "mg" and options.save_format is not None:
        raise UserError(
            f"--save-format {options.save_format} is a format of shards, and shards become a "
            "Hugging Face folder where nothing else is said; say --save-model-type mg for shards, "
            "or leave it out."
        )
    return replace(options, save_model_type="hf" if loaded == "mg" else "mg")


def _conversion(options: ConvertOptions) -> Conversion:
    sizes = ("target_tensor_parallel_size", "target_pipeline_parallel_size")
    sizes += ("num_layers_per_virtual_pipeline_stage",)
    raise_if(number_faults(options, at_least_one=sizes, not_negative=("workers",)))

    names = {field.name for field in fields(Conversion)}
    same = {name: value for name, value in vars(options).items() if name in names}
    return Conversion(
        **same,
        layout=ParallelLayout(
            tensor_model_parallel_size=options.target_tensor_parallel_size,
            pipeline_model_parallel_size=options.target_pipeline_parallel_size,
            num_layers_per_virtual_pipeline_stage=options.num_layers_per_virtual_pipeline_stage,
            num_layer_list=layer_list(options.num_layer_list),
        ),
        lora=GivenLora(
            rank=options.lora_r, alpha=options.lora_alpha, targets=options.lora_target_modules
        ),
        max_shard_bytes=(
            None if options.max_shard_size is None else parse_size(options.max_shard_size)
        ),
    )


def _print_plan(prepared: ConversionPlan) -> None:
    """One line per tensor under its file's; cut to the width of a terminal, whole in a pipe."""
    rows = plan_rows(prepared)
    sizes = {str(path): file.total_bytes for path, file in prepared.target.files.items()}
    lines = dict(zip(rows, aligned([row[1:] for row in rows], "l"), strict=True))
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for file, group in groupby(rows, key=lambda row: row[0]):
        print(f"{file}  {sizes[file]} bytes")
        for row in group:
            print(printable(f"  {lines[row]}")[:width])
    print(
        f"{len(rows)} tensors in {len(prepared.target.files)} files, "
        f"{prepared.target.total_bytes} bytes; every byte has one source. Nothing was written."
    )
