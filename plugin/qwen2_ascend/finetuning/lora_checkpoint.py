"""Checkpoints of a LoRA run, as saved_lora.py lays them out; they resume at any layout."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from qwen2_ascend.checkpoint.load import unwrap
from qwen2_ascend.checkpoint.staging import write_file
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.finetuning.adapter import (
    load_adapter_tensors,
    save_adapter,
    save_adapter_tensors,
)
from qwen2_ascend.finetuning.lora import lora_state
from qwen2_ascend.finetuning.saved_lora import RUN_FILE, SavedLora
from qwen2_ascend.lora_config import LoraConfig
from qwen2_ascend.parallel import ParallelLayout
from qwen2_ascend.training import optimizer as optimizers
from qwen2_ascend.training.checkpointing import CheckpointIdentity
from qwen2_ascend.training.iterations import (
    begin_iteration,
    progress_state,
    publish_iteration,
    restore_progress,
    restore_rng,
)
from qwen2_ascend.training.loop import TrainingRun, gathered_parameters
from qwen2_ascend.training.rng_state import rng_state

Where = tuple[LoraConfig, Qwen2Config, ParallelLayout]
"""What of which model, and how it is cut."""


def save_lora_checkpoint(
    run: TrainingRun, identity: CheckpointIdentity, lora: LoraConfig, base: Path | None
) -> Path:
    """Writes the run's state; every rank calls it. Returns the folder of the iteration.

    Args:
        run: its chunks have adapters.
        identity: of the base model.
        lora: what the adapters are.
        base: where the base model was loaded from.

    Raises:
        OSError: it cannot be written; the folder holds the last checkpoint.
    """
    settings = run.settings.checkpoint
    assert settings.save is not None
    partial = begin_iteration(run, settings.save)
    where: Where = (lora, identity.config, identity.layout)
    with gathered_parameters(run.chunks):
        save_adapter(run.chunks, *where, partial, base_model=str(base) if base else None)
        kinds = [] if settings.no_save_optim else _save_moments(run, where, partial)
    if not settings.no_save_rng and parallel_state.get_data_parallel_rank() == 0:
        torch.save(rng_state(run.runtime), partial / _rng_file())
    if run.runtime.rank == 0:
        state = _plain_state(run, identity, base, kinds)
        write_file(partial / RUN_FILE, json.dumps(state, indent=2).encode())
    return publish_iteration(run, settings.save)


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
            _load_moments(run, saved, (lora, identity.config, identity.layout))
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


def _save_moments(run: TrainingRun, where: Where, folder: Path) -> list[str]:
    """Writes a file for each kind of the optimizer's tensors; the kinds."""
    chunks = [unwrap(chunk) for chunk in run.chunks]
    by_kind: dict[str, list[dict[str, torch.Tensor]]] = {}
    for index, name, values in optimizers.gather_state(run.optimizer, chunks):
        for kind, value in values.items():
            by_kind.setdefault(kind, [{} for _ in chunks])[index][name] = value
    for kind, tensors in by_kind.items():
        save_adapter_tensors(tensors, *where, folder / f"{kind}.safetensors")
    return list(by_kind)


def _load_moments(run: TrainingRun, saved: SavedLora, where: Where) -> None:
    saved.check_optimizer(optimizers.MOMENTS)
    parameters = lora_state(run.chunks)
    state: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {
        parameter: {} for own in parameters for parameter in own.values()
    }
    for kind in saved.state["optimizer"]:
        tensors = [
            {name: torch.zeros(p.shape, dtype=torch.float32) for name, p in own.items()}
            for own in parameters
        ]
        load_adapter_tensors(tensors, *where, saved.folder / f"{kind}.safetensors")
        for own, read in zip(parameters, tensors, strict=True):
            for name, parameter in own.items():
                state[parameter][kind] = read[name]
    optimizers.load_state(run.optimizer, state, int(saved.state["optimizer_updates"]))
    optimizers.load_scaler_state(run.optimizer, saved.state["loss_scaler"])


def _rng_file() -> str:
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    return f"rng_{tp_rank:02d}_{parallel_state.get_pipeline_model_parallel_rank():03d}.pt"
