"""Checkpoints of LoRA runs, as saved_lora.py says; either path resumes the other's, at any layout.

What the Megatron path and ZeRO do alike is in LoraStorage; how the adapters lie on the ranks is
what its subclasses know.
"""

from __future__ import annotations

import io
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from qwen2_ascend.checkpoint.formats.megatron_optimizer import MAIN, MOMENTS
from qwen2_ascend.checkpoint.formats.stored import FileLayout
from qwen2_ascend.checkpoint.staging import partial_folder, publish_new_folder
from qwen2_ascend.files import write_file
from qwen2_ascend.finetuning.adapter import (
    adapter_state,
    lay_out_adapter,
    load_adapter_slices,
    merge_adapter,
)
from qwen2_ascend.finetuning.saved_lora import RUN_FILE, SavedLora
from qwen2_ascend.lora_config import LoraConfig
from qwen2_ascend.runtime import agreement
from qwen2_ascend.training import optimizer as optimizers
from qwen2_ascend.training.checkpointer import Checkpointer, Pending, gathered, host_group
from qwen2_ascend.training.checkpointing import CheckpointIdentity
from qwen2_ascend.training.loop import TrainingRun, gathered_parameters
from qwen2_ascend.training.progress import progress_state, restore_progress, restore_rng
from qwen2_ascend.training.rank_state import own_replica, own_shard
from qwen2_ascend.training.rng_state import rng_state
from qwen2_ascend.training.saving import RankPart


class AdapterPart(NamedTuple):
    """This rank's part of the adapters and of their optimizer."""

    part: RankPart
    kinds: list[str]
    """The optimizer's tensors that are in it."""
    finish: Callable[[Path], None]
    """Called on rank 0 when all ranks have written theirs: makes a PEFT folder of them."""


@dataclass
class LoraStorage(ABC):
    """The checkpoints of one LoRA run, and its export. Every rank calls every method."""

    unlike: ClassVar[str]
    """What a run differs in whose random number generators do not fit."""
    run: Any
    """Its model has adapters."""
    identity: CheckpointIdentity
    """The identity of the base model."""
    lora: LoraConfig
    base: Path | None
    """Where the base model was loaded from."""

    @property
    @abstractmethod
    def layout(self) -> dict[str, Any]:
        """What the files of random number generators belong to; of no two paths the same."""

    @property
    @abstractmethod
    def rng_file(self) -> str:
        """Where this rank keeps its random number generators."""

    @property
    def writes_rng(self) -> bool:
        """Whether no other rank writes the same file."""
        return True

    @abstractmethod
    def adapter_part(self, *, with_optimizer: bool) -> AdapterPart:
        """The adapters as they are now, and their optimizer if it is wanted."""

    @abstractmethod
    def optimizer_facts(self) -> dict[str, Any]:
        """`optimizer_updates` and `loss_scaler`, in megatron-core's terms."""

    @abstractmethod
    def load_optimizer(self, saved: SavedLora) -> None:
        """Puts the optimizer's state back.

        Raises:
            UserError: the checkpoint's does not fit.
        """

    def export(self, folder: Path, also: Mapping[str, bytes]) -> None:
        """Writes the adapters as a folder that `peft` loads, and files of `also` beside them.

        It appears whole, on a disk that all ranks share.

        Raises:
            UserError: on every rank: something was written there meanwhile, and is left alone.
            OSError: it cannot be written.
        """
        part, _, finish = self.adapter_part(with_optimizer=False)
        partial, runtime = partial_folder(folder), self.run.runtime

        def publish() -> None:
            for name, data in also.items():
                write_file(partial / name, data)
            finish(partial)
            publish_new_folder(partial, folder)

        if runtime.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        runtime.barrier()
        part.write(partial)
        runtime.barrier()
        agreement.made_by_first(publish)

    def checkpointer(self, log: Callable[[str], None]) -> Checkpointer:
        """What writes the checkpoints, by the settings' `checkpoint`; `log` prints a line."""
        return Checkpointer(
            self.run,
            lay_out=self._lay_out,
            about={"format": "lora", **self.identity.about},
            side_files={},
            log=log,
            is_small=True,
        )

    def resume(self, saved: SavedLora) -> list[str]:
        """Puts the run where `saved` was; the adapters have been loaded already.

        Returns:
            What is not as it was, in words for the log.

        Raises:
            UserError: the checkpoint is not of this model.
        """
        settings, state = self.run.settings.checkpoint, saved.state
        notes = restore_progress(self.run, state, with_schedule=not settings.no_load_optim)
        if not settings.no_load_optim:
            if state["optimizer"]:
                saved.check_optimizer(MOMENTS)
                self.load_optimizer(saved)
            else:
                notes.append("the checkpoint has no optimizer state: Adam's moments start at zero")
        if not settings.no_load_rng and state["rng"]:
            unlike = None if state["layout"] == self.layout else self.unlike
            notes += restore_rng(self.run, saved.folder / self.rng_file, unlike=unlike)
        self.run.runtime.barrier()
        return notes

    def _lay_out(self, folder: Path) -> Pending:
        settings = self.run.settings.checkpoint
        part, kinds, finish_adapter = self.adapter_part(with_optimizer=not settings.no_save_optim)
        saves_rng = not settings.no_save_rng
        if saves_rng and self.writes_rng:
            data = io.BytesIO()
            torch.save(rng_state(self.run.runtime), data)
            rng = FileLayout(total_bytes=data.tell(), segments=((0, data.getvalue()),))
            part = replace(part, files={**part.files, self.rng_file: rng})
        state = {
            "base": str(self.base.resolve()) if self.base else None,
            "dtype": self.identity.dtype,
            "layout": self.layout,
            **progress_state(self.run),
            "optimizer": kinds,
            **self.optimizer_facts(),
            "rng": saves_rng,
        }

        def finish(folder: Path) -> None:
            finish_adapter(folder)
            write_file(folder / RUN_FILE, json.dumps(state, indent=2).encode())

        return Pending(part=part, finish=finish)


class MegatronLora(LoraStorage):
    """LoRA by megatron-core: every rank writes its slices of the adapters."""

    unlike = "another layout"

    run: TrainingRun

    @cached_property
    def _group(self) -> Any:
        return host_group(self.run.runtime)

    @property
    def layout(self) -> dict[str, Any]:
        return asdict(self.identity.layout)

    @property
    def rng_file(self) -> str:
        tp_rank, pp_stage, _ = own_shard(0)
        return f"rng_{tp_rank:02d}_{pp_stage:03d}.pt"

    @property
    def writes_rng(self) -> bool:
        return own_replica()[0] == 0

    def adapter_part(self, *, with_optimizer: bool) -> AdapterPart:
        run, identity = self.run, self.identity
        with gathered_parameters(run.chunks):
            state = self._state(run.optimizer if with_optimizer else None)
            part, own = lay_out_adapter(state, run.runtime.rank)
        parts = [part for of_rank in gathered(own, run.runtime, self._group) for part in of_rank]
        base = str(self.base) if self.base else None

        def finish(folder: Path) -> None:
            merge_adapter(folder, parts, self.lora, identity.config, base)

        return AdapterPart(part, list(state.kinds), finish)

    def optimizer_facts(self) -> dict[str, Any]:
        return {
            "optimizer_updates": optimizers.num_updates(self.run.optimizer),
            "loss_scaler": optimizers.scaler_state(self.run.optimizer),
        }

    def load_optimizer(self, saved: SavedLora) -> None:
        state, config = self._state(self.run.optimizer), self.identity.config
        stored = {kind: saved.folder / f"{kind}.safetensors" for kind in saved.state["optimizer"]}
        if MAIN in stored and MAIN not in state.kinds:
            # fp32 adapters go on from the fp32 weights of those in 16 bits
            load_adapter_slices(state.whole(), self.lora, config, stored[MAIN])
        for kind, slices in state.emptied(int(saved.state["optimizer_updates"])).items():
            if kind in stored:
                load_adapter_slices(slices, self.lora, config, stored[kind])
        optimizers.load_scaler_state(self.run.optimizer, saved.state["loss_scaler"])

    def _state(self, optimizer: Any) -> Any:
        config, layout = self.identity.config, self.identity.layout
        return adapter_state(self.run.chunks, self.lora, config, layout, optimizer)
