"""What a finished run writes besides its last checkpoint: --save-hf and --save-adapter.

An export is made once, when the run is complete, and appears whole with EXPORT_FILE in it. So the
same command line may be started as often as one likes: while the run goes on nothing is exported,
after a kill the export is made again, and one that is there already is left as it is. Whether it
can be made is known before the run begins.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen2_ascend.errors import UserError
from qwen2_ascend.finetuning.settings import FinetuneSettings
from qwen2_ascend.telemetry.settings import folder_fault
from qwen2_ascend.training.plan import RunPlan

EXPORT_FILE = "qwen2_ascend_export.json"
SAVE_HF, SAVE_ADAPTER = "--save-hf", "--save-adapter"


def find_exports(plan: RunPlan[FinetuneSettings]) -> tuple[str, ...]:
    """Flags of the exports that this run has made already; rank 0 looks for all.

    Raises:
        UserError: an export cannot be made at the end; every reason at once.
    """
    export = plan.settings.export
    asked = {SAVE_HF: export.save_hf, SAVE_ADAPTER: export.save_adapter}
    made, faults = [], []
    for flag, folder in asked.items():
        if folder is None:
            continue
        if _is_made(plan, folder):
            made.append(flag)
        else:
            faults += _folder_faults(plan, flag, folder)
    if export.save_hf and export.save_hf == export.save_adapter:
        faults.append(f"{SAVE_HF} and {SAVE_ADAPTER} name the same folder {export.save_hf}.")
    if faults:
        raise UserError(faults)
    return tuple(made)


def is_all_done(plan: RunPlan[FinetuneSettings]) -> bool:
    """Whether a run without checkpoints has ended with its export, and nothing is to be done."""
    return bool(plan.found.exports) and plan.settings.checkpoint.save is None


def export(
    plan: RunPlan[FinetuneSettings],
    flag: str,
    folder: Path | None,
    say: Callable[[str], None],
    make: Callable[[Path, dict[str, bytes]], object],
) -> None:
    """Makes an export of a complete run, if it is asked for and not there.

    Args:
        plan: of the run.
        flag: that asks for it.
        folder: where it goes.
        say: prints a line.
        make: writes the folder, with the files that it is given by name.
    """
    if folder is None:
        return
    if flag in plan.found.exports:
        say(f"{flag} {folder}: is there already, and complete")
        return
    length = plan.length
    told = {
        "run": plan.identity(),
        "iteration": length.train_iters,
        "consumed_samples": length.num_samples,
    }
    make(folder, {EXPORT_FILE: (json.dumps(told, indent=2) + "\n").encode()})


def merged_dtype(plan: RunPlan[FinetuneSettings]) -> str | None:
    """The dtype of base weights with adapters merged in: theirs; where they mix, config.json's."""
    if plan.lora is None or plan.source is None:
        return None
    dtypes = Counter(held.stored.dtype for held in plan.source.held)
    return next(iter(dtypes)) if len(dtypes) == 1 else plan.config.dtype


def _is_made(plan: RunPlan[FinetuneSettings], folder: Path) -> bool:
    """Whether `folder` is this run's export; one with checkpoints must also have ended there."""
    try:
        told: dict[str, Any] = json.loads((folder / EXPORT_FILE).read_bytes())
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
