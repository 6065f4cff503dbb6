"""Checkpoints of a LoRA run by ZeRO: those of the Megatron path, as `finetuning.saved_lora` says.

Nothing in them depends on the stage or on the number of ranks, and so either path resumes the
other's. Only the random number generators, one file a rank here, belong to as many ranks.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from qwen2_ascend.checkpoint.formats.peft_adapter import CONFIG_FILE, WEIGHTS_FILE, encode_config
from qwen2_ascend.checkpoint.formats.safetensors import encode_header
from qwen2_ascend.checkpoint.formats.stored import FileLayout, TensorSpec
from qwen2_ascend.checkpoint.staging import partial_folder, publish_folder, write_file
from qwen2_ascend.finetuning.deepspeed.checkpoint import rng_file
from qwen2_ascend.finetuning.deepspeed.engine import ZeroRun
from qwen2_ascend.finetuning.deepspeed.lora import adapter_parameters, read_adapter_tensors
from qwen2_ascend.finetuning.deepspeed.optimizer_state import (
    gather_state,
    load_state,
    num_updates,
)
from qwen2_ascend.finetuning.saved_lora import RUN_FILE, SavedLora
from qwen2_ascend.lora_config import LoraConfig
from qwen2_ascend.training.checkpointer import Checkpointer, Pending
from qwen2_ascend.training.checkpointing import CheckpointIdentity
from qwen2_ascend.training.optimizer import MOMENTS
from qwen2_ascend.training.progress import progress_state, restore_progress, restore_rng
from qwen2_ascend.training.rng_state import rng_state
from qwen2_ascend.training.saving import DTYPE_NAMES, RankPart, Store


def lora_checkpointer(
    run: ZeroRun,
    identity: CheckpointIdentity,
    lora: LoraConfig,
    base: Path | None,
    log: Callable[[str], None],
) -> Checkpointer:
    """What writes the checkpoints of a LoRA run, by its settings' `checkpoint`.

    Args:
        run: its model has adapters.
        identity: of the base model.
        lora: what the adapters are.
        base: where the base model was loaded from.
        log: prints a line.
    """

    def lay_out(folder: Path) -> Pending:
        settings, rank = run.settings.checkpoint, run.runtime.rank
        by_file = {WEIGHTS_FILE: whole_adapters(run)}
        if not settings.no_save_optim:
            by_file |= _whole_optimizer(run)
        kinds = [Path(name).stem for name in by_file if name != WEIGHTS_FILE]
        part = _part(by_file) if rank == 0 else RankPart(files={})
        if not settings.no_save_rng:
            data = io.BytesIO()
            torch.save(rng_state(run.runtime), data)
            rng = FileLayout(total_bytes=data.tell(), segments=((0, data.getvalue()),))
            part = replace(part, files={**part.files, rng_file(run): rng})
        state = _plain_state(run, identity, base, kinds)

        def finish(folder: Path) -> None:
            write_file(folder / CONFIG_FILE, encode_config(lora, str(base) if base else None))
            write_file(folder / RUN_FILE, json.dumps(state, indent=2).encode())

        return Pending(part=part, finish=finish)

    return Checkpointer(
        run,
        lay_out=lay_out,
        about={"format": "lora", **identity.about},
        side_files={},
        log=log,
        is_small=True,
    )


def save_adapter(
    run: ZeroRun,
    lora: LoraConfig,
    base: Path | None,
    folder: Path,
    also: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Writes the adapters as a PEFT folder, which appears whole; every rank calls it.

    Files of `also` are written beside them, by name.

    Raises:
        OSError: it cannot be written.
    """
    tensors = whole_adapters(run)
    if run.runtime.rank == 0:
        partial = partial_folder(folder)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, data in also.items():
            write_file(partial / name, data)
        _part({WEIGHTS_FILE: tensors}).write(partial)
        write_file(partial / CONFIG_FILE, encode_config(lora, str(base) if base else None))
        publish_folder(partial, folder)
    run.runtime.barrier()


def resume_lora(
    run: ZeroRun, saved: SavedLora, identity: CheckpointIdentity, lora: LoraConfig
) -> list[str]:
    """Puts the run where `saved` was; the adapters have been loaded already.

    Returns:
        What is not as it was, in words for the log.

    Raises:
        UserError: the checkpoint is not of this model.
    """
    settings, state = run.settings.checkpoint, saved.state
    notes = restore_progress(run, state)
    if not settings.no_load_optim:
        if state["optimizer"]:
            _read_optimizer(run, saved, identity, lora)
        else:
            notes.append("the checkpoint has no optimizer state: Adam's moments start at zero")
    if not settings.no_load_rng and state["rng"]:
        unlike = "other ranks" if state["layout"] != _layout(run) else None
        notes += restore_rng(run, saved.folder / rng_file(run), unlike=unlike)
    run.runtime.barrier()
    return notes


def _plain_state(
    run: ZeroRun, identity: CheckpointIdentity, base: Path | None, kinds: list[str]
) -> dict[str, Any]:
    return {
        "base": str(base.resolve()) if base else None,
        "dtype": identity.dtype,
        "layout": _layout(run),
        **progress_state(run),
        "optimizer": kinds,
        "optimizer_updates": num_updates(run),
        "loss_scaler": scaler_state(run.optimizer.loss_scaler),
        "rng": not run.settings.checkpoint.no_save_rng,
    }


def _layout(run: ZeroRun) -> dict[str, int]:
    """What the generators' files belong to: never equal to a layout of the Megatron path."""
    return {"zero_world_size": run.runtime.world_size}


def whole_adapters(run: ZeroRun) -> dict[str, Tensor]:
    """The adapters under PEFT's names, on the host; every rank calls it."""
    tensors = {}
    for name, parameter in adapter_parameters(run.model).items():
        with run.whole([parameter]):
            tensors[name] = parameter.detach().cpu().clone()
    return tensors


def _whole_optimizer(run: ZeroRun) -> dict[str, dict[str, Tensor]]:
    """A file for each kind of the optimizer's tensors."""
    by_file: dict[str, dict[str, Tensor]] = {}
    for kind, name, values in gather_state(run, adapter_parameters(run.model)):
        by_file.setdefault(f"{kind}.safetensors", {})[name] = values.contiguous()
    return by_file


def _part(by_file: Mapping[str, Mapping[str, Tensor]]) -> RankPart:
    """Files of whole tensors, which one rank writes."""
    files, stores = {}, []
    for file, tensors in by_file.items():
        specs = {
            name: TensorSpec(tuple(tensor.shape), DTYPE_NAMES[tensor.dtype])
            for name, tensor in tensors.items()
        }
        header, offsets = encode_header(specs, {"format": "pt"})
        end = max(offsets[name] + spec.num_bytes for name, spec in specs.items())
        files[file] = FileLayout(total_bytes=end, segments=((0, header),))
        stores += (
            Store(name, file, offsets[name], tuple(tensor.shape), tensor)
            for name, tensor in tensors.items()
        )
    return RankPart(files=files, stores=stores)


def _read_optimizer(
    run: ZeroRun, saved: SavedLora, identity: CheckpointIdentity, lora: LoraConfig
) -> None:
    saved.check_optimizer(MOMENTS)
    states = {
        kind: read_adapter_tensors(saved.folder / f"{kind}.safetensors", identity.config, lora)
        for kind in saved.state["optimizer"]
    }
    updates = int(saved.state["optimizer_updates"])
    load_state(run, adapter_parameters(run.model), states, updates)
    load_scaler_state(run.optimizer.loss_scaler, saved.state["loss_scaler"])


def scaler_state(scaler: Any) -> dict[str, float]:
    """DeepSpeed's dynamic loss scale in megatron-core's terms; empty where it is not dynamic."""
    if not scaler.dynamic:
        return {}
    since = scaler.cur_iter - scaler.last_overflow_iter - 1
    return {
        "scale": float(scaler.cur_scale),
        # DeepSpeed raises the scale in the step after `scale_window` good ones, megatron-core in
        # the last of them: it is one behind, and -1 just after an overflow
        "growth_tracker": (since - 1) % scaler.scale_window if since else -1,
        "hysteresis_tracker": scaler.cur_hysteresis,
    }


def load_scaler_state(scaler: Any, state: dict[str, float]) -> None:
    """Puts `scaler_state` back, if this run scales its loss dynamically too."""
    if state and scaler.dynamic:
        scaler.cur_scale = state["scale"]
        scaler.cur_iter, scaler.last_overflow_iter = int(state["growth_tracker"]) + 1, -1
        scaler.cur_hysteresis = int(state["hysteresis_tracker"])
