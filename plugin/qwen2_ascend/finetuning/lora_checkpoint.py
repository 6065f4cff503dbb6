"""Checkpoints of a LoRA run, as saved_lora.py lays them out; they resume at any layout."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from qwen2_ascend.checkpoint.formats.stored import FileLayout
from qwen2_ascend.checkpoint.staging import write_file
from qwen2_ascend.finetuning.adapter import (
    adapter_state,
    lay_out_adapter,
    load_adapter_slices,
    merge_adapter,
)
from qwen2_ascend.finetuning.saved_lora import RUN_FILE, SavedLora
from qwen2_ascend.lora_config import LoraConfig
from qwen2_ascend.training import optimizer as optimizers
from qwen2_ascend.training.checkpointer import Checkpointer, Pending, gathered, host_group
from qwen2_ascend.training.checkpointing import CheckpointIdentity
from qwen2_ascend.training.loop import TrainingRun, gathered_parameters
from qwen2_ascend.training.progress import progress_state, restore_progress, restore_rng
from qwen2_ascend.training.rank_state import own_replica, own_shard
from qwen2_ascend.training.rng_state import rng_state


def lora_checkpointer(
    run: TrainingRun,
    identity: CheckpointIdentity,
    lora: LoraConfig,
    base: Path | None,
    log: Callable[[str], None],
) -> Checkpointer:
    """What writes the checkpoints of a LoRA run, by its settings' `checkpoint`.

    Args:
        run: its chunks have adapters.
        identity: of the base model.
        lora: what the adapters are.
        base: where the base model was loaded from.
        log: prints a line.
    """
    group = host_group(run.runtime)

    def lay_out(folder: Path) -> Pending:
        settings = run.settings.checkpoint
        optimizer = None if settings.no_save_optim else run.optimizer
        with gathered_parameters(run.chunks):
            adapters = adapter_state(run.chunks, lora, identity.config, identity.layout, optimizer)
            part, own = lay_out_adapter(adapters, run.runtime.rank)
        parts = [part for of_rank in gathered(own, run.runtime, group) for part in of_rank]
        if not settings.no_save_rng and own_replica()[0] == 0:
            data = io.BytesIO()
            torch.save(rng_state(run.runtime), data)
            rng = FileLayout(total_bytes=data.tell(), segments=((0, data.getvalue()),))
            part = replace(part, files={**part.files, _rng_file(): rng})
        state = _plain_state(run, identity, base, list(adapters.kinds))

        def finish(folder: Path) -> None:
            base_model = str(base) if base else None
            merge_adapter(folder, parts, lora, identity.config, base_model)
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


def resume_lora(
    run: TrainingRun, saved: SavedLora, identity: CheckpointIdentity, lora: LoraConfig
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
            _load_moments(run, saved, identity, lora)
        else:
            notes.append("the checkpoint has no optimizer state: Adam's moments start at zero")
    if not settings.no_load_rng and state["rng"]:
        unlike = "another layout" if state["layout"] != asdict(identity.layout) else None
        notes += restore_rng(run, saved.folder / _rng_file(), unlike=unlike)
    run.runtime.barrier()
    return notes


def _plain_state(
    run: TrainingRun, identity: CheckpointIdentity, base: Path | None, kinds: list[str]
) -> dict[str, Any]:
    return {
        "base": str(base.resolve()) if base else None,
        "dtype": identity.dtype,
        "layout": asdict(identity.layout),
        **progress_state(run),
        "optimizer": kinds,
        "optimizer_updates": optimizers.num_updates(run.optimizer),
        "loss_scaler": optimizers.scaler_state(run.optimizer),
        "rng": not run.settings.checkpoint.no_save_rng,
    }


def _load_moments(
    run: TrainingRun, saved: SavedLora, identity: CheckpointIdentity, lora: LoraConfig
) -> None:
    saved.check_optimizer(optimizers.MOMENTS)
    adapters = adapter_state(run.chunks, lora, identity.config, identity.layout, run.optimizer)
    stored = {kind: saved.folder / f"{kind}.safetensors" for kind in saved.state["optimizer"]}
    if optimizers.MAIN in stored and optimizers.MAIN not in adapters.kinds:
        # fp32 adapters go on from the fp32 weights of those in 16 bits
        load_adapter_slices(adapters.whole(), lora, identity.config, stored[optimizers.MAIN])
    for kind, slices in adapters.emptied(int(saved.state["optimizer_updates"])).items():
        if kind in stored:
            load_adapter_slices(slices, lora, identity.config, stored[kind])
    optimizers.load_scaler_state(run.optimizer, saved.state["loss_scaler"])


def _rng_file() -> str:
    tp_rank, pp_stage, _ = own_shard(0)
    return f"rng_{tp_rank:02d}_{pp_stage:03d}.pt"
