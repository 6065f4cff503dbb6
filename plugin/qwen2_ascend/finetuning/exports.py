"""What a finished run writes besides its last checkpoint: --save-hf and --save-adapter.

An export is made once, when the run is complete, and appears whole with EXPORT_FILE in it. So the
same command line may be started as often as one likes: while the run goes on nothing is exported,
after a kill the export is made again, and one that is there already is left as it is. Whether it
can be made is known before the run begins.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2_ascend.checkpoint.convert import Conversion, prepare, to_hugging_face
from qwen2_ascend.checkpoint.formats.megatron import tracked_folder
from qwen2_ascend.errors import Faults, raise_if
from qwen2_ascend.files import parse_json, read_bytes
from qwen2_ascend.finetuning.deepspeed.saved import find_saved_zero
from qwen2_ascend.finetuning.settings import FinetuneSettings
from qwen2_ascend.finetuning.taught import taught_files
from qwen2_ascend.telemetry.settings import folder_fault
from qwen2_ascend.training.plan import RunPlan

if TYPE_CHECKING:
    from qwen2_ascend.finetuning.lora_checkpoint import LoraStorage
    from qwen2_ascend.runtime import Runtime

logger = logging.getLogger(__name__)

EXPORT_FILE = "qwen2_ascend_export.json"
SAVE_HF, SAVE_ADAPTER = "--save-hf", "--save-adapter"


def find_exports(plan: RunPlan[FinetuneSettings]) -> tuple[str, ...]:
    """Flags of the exports that this run has made already; rank 0 looks for all.

    Raises:
        UserError: an export cannot be made at the end; every reason at once.
    """
    export = plan.settings.export
    asked = {SAVE_HF: export.save_hf, SAVE_ADAPTER: export.save_adapter}
    made, faults = [], Faults()
    for flag, folder in asked.items():
        if folder is not None and _is_made(plan, folder):
            made.append(flag)
        elif folder is not None:
            faults += _folder_faults(plan, flag, folder)
    if export.save_hf and SAVE_HF not in made and plan.lora is not None and plan.base is None:
        faults.append("--save-hf with LoRA needs --load: there is no folder to merge it into.")
    if export.save_hf and export.save_hf == export.save_adapter:
        faults.append(f"{SAVE_HF} and {SAVE_ADAPTER} name the same folder {export.save_hf}.")
    if export.save_hf and SAVE_HF not in made and not faults:
        faults.collect(partial(_check_conversion, plan, export.save_hf))
    raise_if(faults)
    return tuple(made)


def is_all_done(plan: RunPlan[FinetuneSettings]) -> bool:
    """Whether a run without checkpoints has ended with its export, and nothing is to be done."""
    return bool(plan.found.exports) and plan.settings.checkpoint.save is None


def finish(
    plan: RunPlan[FinetuneSettings],
    runtime: Runtime,
    is_complete: bool,
    storage: LoraStorage | None = None,
) -> None:
    """Makes the exports of a complete run and parts the ranks; every rank calls it.

    Args:
        plan: the plan of the run, with its length.
        runtime: this rank's runtime, which is closed.
        is_complete: whether the run is; if not, nothing is exported.
        storage: of the adapters, where there are any.
    """
    export, made = plan.settings.export, plan.found.exports
    flags = {SAVE_ADAPTER: export.save_adapter, SAVE_HF: export.save_hf}
    asked = {flag: folder for flag, folder in flags.items() if folder is not None}
    due = {flag: folder for flag, folder in asked.items() if flag not in made and is_complete}
    for flag in made:
        logger.info(f"{flag} {asked[flag]}: is there already, and complete")
    if asked and not is_complete:
        goes_on = "the same command goes on with it"
        if plan.settings.checkpoint.save is None:
            goes_on = "without --save it cannot be gone on with"
        logger.info(f"{' and '.join(asked)}: written when the run is complete; {goes_on}")
    also = {EXPORT_FILE: _export_file(plan)} if due else {}
    if SAVE_ADAPTER in due:
        assert storage is not None
        storage.export(due[SAVE_ADAPTER], also)
    runtime.close()
    if SAVE_HF in due and runtime.rank == 0:
        _write_hugging_face(plan, due[SAVE_HF], also)


def _export_file(plan: RunPlan[FinetuneSettings]) -> bytes:
    """What `_is_made` knows this run's export by."""
    length = plan.length
    told = {
        "run": plan.identity(),
        "iteration": length.train_iters,
        "consumed_samples": length.num_samples,
    }
    return (json.dumps(told, indent=2) + "\n").encode()


def _write_hugging_face(
    plan: RunPlan[FinetuneSettings], folder: Path, also: Mapping[str, bytes]
) -> None:
    """Makes a Hugging Face folder of the last checkpoint, adapters merged into it."""
    also = {**also, **taught_files(plan)}
    checkpoint, adapter = plan.settings.checkpoint.save, None
    assert checkpoint is not None
    if plan.lora is not None:
        assert plan.base is not None
        checkpoint, adapter = plan.base, tracked_folder(checkpoint)
    elif (zero := find_saved_zero(checkpoint)) is not None:
        checkpoint = zero.folder
    dtype = merged_dtype(plan)
    to_hugging_face(checkpoint, folder, adapter=adapter, dtype=dtype, also=also)


def _check_conversion(plan: RunPlan[FinetuneSettings], folder: Path) -> None:
    """What --save-hf with LoRA does at the end, as far as it can be done without the adapter.

    Raises:
        UserError: what would not fit then.
    """
    if plan.lora is not None:
        assert plan.base is not None
        dtype = merged_dtype(plan)
        prepare(Conversion(load_dir=plan.base, save_dir=folder, save_model_type="hf", dtype=dtype))


def merged_dtype(plan: RunPlan[FinetuneSettings]) -> str | None:
    """The dtype of base weights with adapters merged in: theirs; where they mix, config.json's."""
    if plan.lora is None or plan.source is None:
        return None
    dtypes = Counter(held.stored.dtype for held in plan.source.held)
    return next(iter(dtypes)) if len(dtypes) == 1 else plan.config.dtype


def _is_made(plan: RunPlan[FinetuneSettings], folder: Path) -> bool:
    """Whether `folder` is this run's export; one with checkpoints must also have ended there."""
    try:
        told: dict[str, Any] = parse_json(read_bytes(folder / EXPORT_FILE))
        if told["run"] != plan.identity():
            return False
        made = {name: told[name] for name in ("iteration", "consumed_samples")}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return plan.settings.checkpoint.save is None or made == plan.made()


def _folder_faults(plan: RunPlan[FinetuneSettings], flag: str, folder: Path) -> list[str]:
    """Why nothing could be written there when the run ends."""
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        return [f"{flag} {folder} is there already; name a new folder, or remove it."]
    fault = folder_fault(folder)
    faults = [f"{flag} {folder}: {fault}."] if fault else []
    real = Path(os.path.realpath(folder))
    read = {"--save": plan.settings.checkpoint.save, "--load": plan.base}
    for other, path in read.items():
        if path is None:
            continue
        theirs = Path(os.path.realpath(path))
        if theirs == real or real in theirs.parents or (flag == SAVE_HF and theirs in real.parents):
            faults.append(
                f"{flag} {folder} and {other} {path} lie in each other; name a folder outside it."
            )
    return faults
