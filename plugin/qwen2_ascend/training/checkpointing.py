"""Training checkpoints: everything a run needs to go on as if it had not stopped.

    SAVE/config.json, tokenizer files ...          so that merging needs this folder alone
    SAVE/iter_0000100/                             torch_dist, or the mp_rank tree (`torch`)
    SAVE/latest_checkpointed_iteration.txt         written last, by rename

The weights of either format are read by `checkpoint.load`, as any other source's are. Here is the
rest: the optimizer in the canonical form of `training.optimizer`, and, by `training.iterations`,
random number generators, schedule and progress. `torch_dist` resumes at any layout. `torch` holds a
file per tensor/pipeline rank with tensors, plain containers and a Namespace, and resumes at its own
layout.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from qwen2_ascend.checkpoint.formats import megatron, torch_dist, torch_pt
from qwen2_ascend.checkpoint.load import load_tensors, unwrap
from qwen2_ascend.checkpoint.source import open_torch_dist_states
from qwen2_ascend.checkpoint.staging import fsync_folder
from qwen2_ascend.checkpoint.target import megatron_args
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError
from qwen2_ascend.parallel import ParallelLayout
from qwen2_ascend.runtime.megatron_compat import prepare_torch_dist, virtual_stage
from qwen2_ascend.training import optimizer as optimizers
from qwen2_ascend.training.iterations import (
    begin_iteration,
    progress_state,
    publish_iteration,
    restore_progress,
    with_tensors,
)
from qwen2_ascend.training.loop import TrainingRun, gathered_parameters
from qwen2_ascend.training.rng_state import rng_state, set_rng_state
from qwen2_ascend.training.saved_run import SavedRun
from qwen2_ascend.training.settings import CheckpointSettings

OPTIMIZER = "optimizer_state"
RNG = "rng_state"
PLACES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
    "num_layer_list",
)
"""What of a checkpoint's args says which rank holds what."""


@dataclass(frozen=True, kw_only=True)
class CheckpointIdentity:
    """What a checkpoint says about its model, besides the weights."""

    config: Qwen2Config
    layout: ParallelLayout
    padded_vocab_size: int
    dtype: str
    """bf16, fp16 or fp32."""
    side_files: Mapping[Path, bytes]
    """config.json, tokenizer and chat template files, by their place in the checkpoint folder."""


# --- saving --------------------------------------------------------------------------------------


def save_checkpoint(
    run: TrainingRun, identity: CheckpointIdentity, settings: CheckpointSettings
) -> Path:
    """Writes the run's state; every rank calls it. Returns the folder of the iteration.

    Raises:
        OSError: it cannot be written; the folder holds the last checkpoint.
    """
    assert settings.save is not None
    partial = begin_iteration(run, settings.save)
    common = _common_state(run, identity)
    with gathered_parameters(run.chunks):
        if settings.ckpt_format == "torch_dist":
            _save_torch_dist(run, common, partial, settings)
        else:
            _save_rank_file(run, common, partial, settings, identity.layout)
    return publish_iteration(run, settings.save, identity.side_files)


def _common_state(run: TrainingRun, identity: CheckpointIdentity) -> dict[str, Any]:
    """What is the same on every rank, in plain values."""
    args = megatron_args(
        identity.config, identity.layout, identity.padded_vocab_size, identity.dtype
    )
    vars(args).update(
        iteration=run.progress.iteration,
        consumed_train_samples=run.progress.consumed_samples,
        seq_length=run.settings.batch.seq_length,
        micro_batch_size=run.settings.batch.micro_batch_size,
        global_batch_size=run.global_batch_size,
        use_distributed_optimizer=run.settings.parallel.use_distributed_optimizer,
        sequence_parallel=run.settings.parallel.sequence_parallel,
        seed=run.settings.runtime.seed,
    )
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": run.progress.iteration,
        **progress_state(run),
        "optimizer_updates": optimizers.num_updates(run.optimizer),
        "loss_scaler": optimizers.scaler_state(run.optimizer),
    }


def _save_torch_dist(
    run: TrainingRun, common: dict[str, Any], folder: Path, settings: CheckpointSettings
) -> None:
    models = _sharded_models(run.chunks)
    state: dict[str, Any] = {**common, **models}
    if not settings.no_save_optim:
        sharded = _sharded_optimizer(run, models)
        # the other data-parallel ranks only helped to gather it
        state[OPTIMIZER] = sharded if parallel_state.get_data_parallel_rank() == 0 else {}
    if not settings.no_save_rng:
        state[RNG] = _sharded_rng(rng_state(run.runtime))
    kinds = _kinds(run.chunks) if not settings.no_save_optim else ()
    state["contents"] = {"optimizer": list(kinds), "rng": not settings.no_save_rng}
    prepare_torch_dist()
    dist_checkpointing.save(state, str(folder), ("torch_dist", 1))
    own = list(folder.glob(f"__{run.runtime.rank}_*.distcp"))
    if run.runtime.rank == 0:
        own += [path for path in folder.iterdir() if path.suffix != ".distcp"]
    for path in own:
        _fsync(path)


def _save_rank_file(
    run: TrainingRun,
    common: dict[str, Any],
    folder: Path,
    settings: CheckpointSettings,
    layout: ParallelLayout,
) -> None:
    names = _model_names(run.chunks)
    state: dict[str, Any] = dict(common)
    for name, chunk in zip(names, run.chunks, strict=True):
        state[name] = OrderedDict(
            (key, value.detach().cpu().clone())
            for key, value in unwrap(chunk).named_parameters()
            if megatron.plain_name(key)
        )
    if not settings.no_save_optim:
        state[OPTIMIZER] = {name: {} for name in names}
        for index, key, values in optimizers.gather_state(run.optimizer, _modules(run.chunks)):
            state[OPTIMIZER][names[index]][key] = values
    if not settings.no_save_rng:
        state[RNG] = rng_state(run.runtime)
    kinds = _kinds(run.chunks) if not settings.no_save_optim else ()
    state["contents"] = {"optimizer": list(kinds), "rng": not settings.no_save_rng}
    if parallel_state.get_data_parallel_rank() == 0:
        path = folder / _rank_folder(layout) / megatron.PT_FILE
        path.parent.mkdir()
        torch.save(state, path)
        _fsync(path)
        fsync_folder(path.parent)


def _fsync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


# --- what a checkpoint holds ---------------------------------------------------------------------


def _modules(chunks: Sequence[Any]) -> list[Any]:
    return [unwrap(chunk) for chunk in chunks]


def _model_names(chunks: Sequence[Any]) -> list[str]:
    return [megatron.model_key(index, len(chunks)) for index in range(len(chunks))]


def _rank_folder(layout: ParallelLayout) -> str:
    return megatron.rank_folder_name(
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        layout.pp,
    )


def _kinds(chunks: Sequence[Any]) -> tuple[str, ...]:
    """The optimizer's tensors of each parameter."""
    dtype = next(chunks[0].parameters()).dtype
    moments = optimizers.MOMENTS
    return moments if dtype == torch.float32 else (*moments, optimizers.MAIN)


def _sharded_models(chunks: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """The weights as megatron-core's sharded tensors, by chunk and local name."""
    models = {}
    for index, (name, chunk) in enumerate(zip(_model_names(chunks), chunks, strict=True)):
        with virtual_stage(index if len(chunks) > 1 else None):
            sharded = unwrap(chunk).sharded_state_dict(prefix="")
        models[name] = {key: value for key, value in sharded.items() if megatron.plain_name(key)}
    return models


def _state_key(kind: str, weight: str) -> str:
    return f"optimizer.state.{kind}.{weight}"


def _sharded_optimizer(run: TrainingRun, models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The optimizer's tensors, cut as the weights are, under Megatron's names."""
    names = list(models)
    state: dict[str, Any] = {name: {} for name in names}
    for index, key, values in optimizers.gather_state(run.optimizer, _modules(run.chunks)):
        weight = models[names[index]][key]
        state[names[index]][key] = {
            kind: _like(weight, kind, value) for kind, value in values.items()
        }
    return state


def _like(weight: Any, kind: str, value: torch.Tensor) -> Any:
    """A sharded tensor, or a factory of some, with other contents."""
    changes: dict[str, Any] = {"key": _state_key(kind, weight.key), "data": value}
    if isinstance(weight, ShardedTensor):
        changes["dtype"] = value.dtype
    return replace(weight, **changes)


def _sharded_rng(state: Any) -> ShardedObject:
    """One state per tensor/pipeline rank; data-parallel ranks draw alike."""
    return ShardedObject(
        RNG,
        state,
        (
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_world_size(),
        ),
        (
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_rank(),
        ),
        replica_id=parallel_state.get_data_parallel_rank(),
    )


# --- resuming ------------------------------------------------------------------------------------


def resume(
    run: TrainingRun,
    saved: SavedRun,
    identity: CheckpointIdentity,
    settings: CheckpointSettings,
) -> list[str]:
    """Puts the run where `saved` was; the weights have been loaded already.

    Returns:
        What is not as it was, in words for the log.

    Raises:
        UserError: the checkpoint's optimizer does not fit this layout.
    """
    common = saved.common
    notes = restore_progress(run, common)
    same_layout = all(
        getattr(common["args"], name, None) == value for name, value in _places(identity).items()
    )
    wants_optimizer = not settings.no_load_optim and saved.has_optimizer
    wants_rng = not settings.no_load_rng and common["contents"]["rng"]
    if wants_optimizer and saved.padded_vocab_size != identity.padded_vocab_size:
        raise UserError(
            f"{saved.folder}: its optimizer state has {saved.padded_vocab_size} vocabulary rows, "
            f"not {identity.padded_vocab_size}; leave the padding flags out, or take the weights "
            "alone with --no-load-optim."
        )
    if not saved.has_optimizer and not settings.no_load_optim:
        notes.append("the checkpoint has no optimizer state: Adam's moments start at zero")
    if wants_rng and not same_layout:
        notes.append("another layout: the random number generators are seeded anew")
    if megatron.is_torch_dist(saved.folder):
        state, rng = _read_torch_dist(
            run, saved, identity, wants_optimizer, wants_rng and same_layout
        )
    else:
        if wants_optimizer and not same_layout:
            raise UserError(_other_layout(saved, common["args"]))
        state, rng = _read_rank_file(run, saved, identity, wants_rng and same_layout)
    if wants_optimizer:
        updates = int(common["optimizer_updates"])
        optimizers.load_state(run.optimizer, _by_parameter(run.chunks, state), updates)
        optimizers.load_scaler_state(run.optimizer, common["loss_scaler"])
    if rng is not None:
        set_rng_state(run.runtime, rng)
    torch.distributed.barrier()
    return notes


def _places(identity: CheckpointIdentity) -> dict[str, Any]:
    args = megatron_args(
        identity.config, identity.layout, identity.padded_vocab_size, identity.dtype
    )
    return {name: getattr(args, name) for name in PLACES}


def _other_layout(saved: SavedRun, args: Namespace) -> str:
    was = ", ".join(f"{name}={getattr(args, name, None)}" for name in PLACES)
    return (
        f"{saved.folder}: was saved with --ckpt-format torch, whose optimizer state fits only the "
        f"layout it was saved at ({was}); resume at that layout, or take the weights alone with "
        "--no-load-optim. --ckpt-format torch_dist can be resumed at any layout."
    )


def _read_torch_dist(
    run: TrainingRun,
    saved: SavedRun,
    identity: CheckpointIdentity,
    wants_optimizer: bool,
    wants_rng: bool,
) -> tuple[dict[str, Any], Any]:
    """The optimizer's state and the generators', read without megatron-core.

    Its `load` unpickles what it finds: with `weights_only=False` before 0.14, and the folder's
    `.metadata` in every release.
    """
    rng = None
    if wants_rng:
        key = _sharded_rng(None).unique_key
        rng = with_tensors(torch_dist.read_object(saved.folder, key)[0])
    return (_read_moments(run, saved, identity) if wants_optimizer else {}), rng


def _read_moments(
    run: TrainingRun, saved: SavedRun, identity: CheckpointIdentity
) -> dict[str, Any]:
    """The optimizer's tensors, cut for this rank, by chunk, parameter and kind."""
    found = saved.common["contents"]["optimizer"]
    kinds = dict.fromkeys([*found, *_kinds(run.chunks)])
    # fp32 weights are their own main weights
    prefixes = {kind: _state_key(kind, "") if kind in found else "" for kind in kinds}
    # padding has moments too: here its rows count as the vocabulary's
    config = replace(identity.config, vocab_size=identity.padded_vocab_size)
    sources = open_torch_dist_states(saved.folder, config, prefixes.values())
    modules = _modules(run.chunks)
    state: dict[str, Any] = {name: {} for name in _model_names(run.chunks)}
    for kind, prefix in prefixes.items():
        tensors = [
            {
                name: torch.empty(parameter.shape, dtype=torch.float32)
                for name, parameter in module.named_parameters()
            }
            for module in modules
        ]
        load_tensors(
            tensors,
            sources[prefix],
            identity.layout,
            padded_vocab_size=identity.padded_vocab_size,
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            pp_stage=parallel_state.get_pipeline_model_parallel_rank(),
        )
        for values, model in zip(tensors, state.values(), strict=True):
            for name, value in values.items():
                model.setdefault(name, {})[kind] = value
    return state


def _read_rank_file(
    run: TrainingRun, saved: SavedRun, identity: CheckpointIdentity, wants_rng: bool
) -> tuple[dict[str, Any], Any]:
    path = saved.folder / _rank_folder(identity.layout) / megatron.PT_FILE
    if not path.is_file():
        return {}, None  # another layout, and neither optimizer nor generators are wanted
    state: Any = torch_pt.read(path)
    rng = with_tensors(state[RNG]) if wants_rng else None
    optimizer = with_tensors(state.get(OPTIMIZER, {}))
    found = saved.common["contents"]["optimizer"]
    if optimizers.MAIN in _kinds(run.chunks) and optimizers.MAIN not in found:
        # fp32 weights are their own main weights
        for name, model in optimizer.items():
            for key, values in model.items():
                values[optimizers.MAIN] = with_tensors(state[name][key])
    return optimizer, rng


def _by_parameter(
    chunks: Sequence[Any], state: Mapping[str, Mapping[str, Any]]
) -> dict[torch.nn.Parameter, Mapping[str, torch.Tensor]]:
    return {
        parameter: state[name][key]
        for name, chunk in zip(_model_names(chunks), chunks, strict=True)
        for key, parameter in unwrap(chunk).named_parameters()
    }
