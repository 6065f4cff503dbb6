"""Checkpoints of a ZeRO run: a Hugging Face folder with DeepSpeed's own checkpoint in it.

    SAVE/iter_0000100/config.json, tokenizer, *.safetensors     the model; a Hugging Face folder
    SAVE/iter_0000100/zero/*.pt, latest, zero_to_fp32.py        DeepSpeed's checkpoint, tag "zero"
    SAVE/iter_0000100/rng_00000.pt                              random number generators, per rank
    SAVE/iter_0000100/zero.json                                 progress and schedule
    SAVE/latest_checkpointed_iteration.txt                      written last, by rename

So everything that reads a Hugging Face folder reads an iteration, and no pickle is opened for it.
DeepSpeed's files, which are pickles, are read when the run goes on only, and only with tensors,
plain values and the classes of `_known_classes` in them.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qwen2_ascend.checkpoint.transformers_model import save_hugging_face
from qwen2_ascend.errors import UserError
from qwen2_ascend.files import write_file
from qwen2_ascend.finetuning.deepspeed.engine import ZeroRun
from qwen2_ascend.finetuning.deepspeed.saved import RUN_FILE, SavedZero
from qwen2_ascend.training.checkpointer import Checkpointer, Pending
from qwen2_ascend.training.checkpointing import CheckpointIdentity
from qwen2_ascend.training.progress import progress_state, restore_progress, restore_rng
from qwen2_ascend.training.rng_state import rng_state
from qwen2_ascend.training.saving import RankPart

TAG = "zero"


def zero_checkpointer(
    run: ZeroRun, identity: CheckpointIdentity, log: Callable[[str], None]
) -> Checkpointer:
    """What writes the checkpoints of a ZeRO run of all weights, by its settings' `checkpoint`."""

    def lay_out(folder: Path) -> Pending:
        """DeepSpeed writes here and now; what is left is to make the checksums."""
        settings, rank = run.settings.checkpoint, run.runtime.rank
        save_hugging_face(
            run.model,
            identity.config,
            folder,
            run.whole,
            dtype=identity.dtype,
            side_files=identity.side_files,
            writes=rank == 0,
        )
        if not settings.no_save_optim:
            run.engine.save_checkpoint(str(folder), tag=TAG)
        if not settings.no_save_rng:
            torch.save(rng_state(run.runtime), folder / rng_file(run))
        if rank == 0:
            write_file(folder / RUN_FILE, json.dumps(_plain_state(run), indent=2).encode())
        run.runtime.barrier()
        files = sorted(
            str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
        )
        return Pending(part=RankPart(files={}, whole=files[rank :: run.runtime.world_size]))

    return Checkpointer(
        run,
        lay_out=lay_out,
        about={"format": "zero", **identity.about},
        side_files={},
        log=log,
    )


def resume_zero(run: ZeroRun, saved: SavedZero) -> list[str]:
    """Puts the run where `saved` was; the weights have been loaded already.

    Returns:
        What is not as it was, in words for the log.

    Raises:
        UserError: DeepSpeed's checkpoint does not fit the ranks or the stage, or is damaged.
    """
    settings, state = run.settings.checkpoint, saved.state
    notes = []
    if not settings.no_load_optim and not state["optimizer"]:
        notes.append("the checkpoint has no optimizer state: Adam's moments start at zero")
    elif not settings.no_load_optim:
        _check_cut(run, saved)
        with _settings_kept(run.optimizer):
            _load_engine(run, saved.folder)
    notes += restore_progress(run, state, with_schedule=not settings.no_load_optim)
    if not settings.no_load_rng and state["rng"]:
        same_ranks = state["world_size"] == run.runtime.world_size
        unlike = None if same_ranks else "another number of ranks"
        notes += restore_rng(run, saved.folder / rng_file(run), unlike=unlike)
    run.runtime.barrier()
    return notes


def _plain_state(run: ZeroRun) -> dict[str, Any]:
    checkpoint = run.settings.checkpoint
    return {
        "zero_stage": run.stage,
        "world_size": run.runtime.world_size,
        **progress_state(run),
        "optimizer": not checkpoint.no_save_optim,
        "rng": not checkpoint.no_save_rng,
    }


def _check_cut(run: ZeroRun, saved: SavedZero) -> None:
    was = (saved.state["zero_stage"], saved.state["world_size"])
    if was != (run.stage, run.runtime.world_size):
        raise UserError(
            f"{saved.folder}: its optimizer state is that of ZeRO stage {was[0]} on {was[1]} "
            f"rank(s), this is stage {run.stage} on {run.runtime.world_size}; resume as it was, or "
            "go on from the weights with Adam's moments at zero: --no-load-optim."
        )


def _load_engine(run: ZeroRun, folder: Path) -> None:
    engine = run.engine
    engine.checkpoint_engine = _safe(engine.checkpoint_engine)
    try:
        path, _ = engine.load_checkpoint(str(folder), tag=TAG, load_lr_scheduler_states=False)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{folder / TAG}: holds what no checkpoint of DeepSpeed's does, and was not read "
            f"({str(error).splitlines()[0][:80]}); --no-load-optim goes on from the weights."
        ) from error
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{folder / TAG}: cannot be resumed ({error}); --no-load-optim goes on from the "
            "weights beside it, with Adam's moments at zero."
        ) from error
    if path is None:
        raise UserError(f"{folder / TAG}: there is no DeepSpeed checkpoint; --no-load-optim.")


@contextmanager
def _settings_kept(zero: Any) -> Iterator[None]:
    """What the flags say of the optimizer stays as it is while DeepSpeed loads its state.

    DeepSpeed takes over how the run that is resumed clipped, scaled its loss and averaged.
    """
    clip_grad, scaler = zero.clip_grad, getattr(zero, "loss_scaler", None)
    said = [{name: group[name] for name in ("betas", "eps")} for group in zero.param_groups]
    yield
    zero.clip_grad = clip_grad
    for group, own in zip(zero.param_groups, said, strict=True):
        group.update(own)
    if scaler is not None:  # its optimizer for bf16 scales nothing
        take_scale(scaler, zero.loss_scaler)
        zero.loss_scaler, zero.dynamic_loss_scale = scaler, scaler.dynamic


def take_scale(scaler: Any, saved: Any) -> None:
    """Goes on from the scale of `saved` where both are dynamic, by the rules of `scaler`."""
    if scaler.dynamic and saved.dynamic:
        for name in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"):
            setattr(scaler, name, getattr(saved, name))


def _safe(inner: Any) -> Any:
    """DeepSpeed's checkpoint engine, which unpickles anything, reading only what is known."""

    class SafeCheckpointEngine(type(inner)):
        def load(self, path: str, map_location: Any = None) -> Any:
            with torch.serialization.safe_globals(_known_classes()):
                return torch.load(path, map_location=map_location, weights_only=True)

    safe = SafeCheckpointEngine.__new__(SafeCheckpointEngine)
    safe.__dict__.update(inner.__dict__)
    return safe


def _known_classes() -> list[Any]:
    """What DeepSpeed's files hold besides tensors: classes that only keep values."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address, set]


def rng_file(run: ZeroRun) -> str:
    """Where this rank keeps its random number generators."""
    return f"rng_{run.runtime.rank:05d}.pt"
