"""Checkpoints of a LoRA run by ZeRO: those of the Megatron path, as `finetuning.saved_lora` says.

Nothing in them depends on the stage or on the number of ranks. Only the random number generators,
one file a rank here, belong to as many ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qwen2_ascend.checkpoint.formats.peft_adapter import CONFIG_FILE, WEIGHTS_FILE, encode_config
from qwen2_ascend.checkpoint.formats.safetensors import encode_header
from qwen2_ascend.checkpoint.formats.stored import FileLayout, TensorSpec
from qwen2_ascend.dtypes import DTYPE_NAMES
from qwen2_ascend.files import write_file
from qwen2_ascend.finetuning.deepspeed.checkpoint import rng_file
from qwen2_ascend.finetuning.deepspeed.engine import ZeroRun
from qwen2_ascend.finetuning.deepspeed.lora import adapter_parameters, read_adapter_tensors
from qwen2_ascend.finetuning.deepspeed.optimizer_state import gather_state, load_state, num_updates
from qwen2_ascend.finetuning.lora_checkpoint import AdapterPart, LoraStorage
from qwen2_ascend.finetuning.saved_lora import SavedLora
from qwen2_ascend.training.saving import RankPart, Store


class ZeroLora(LoraStorage):
    """LoRA under ZeRO: the ranks gather whole tensors, and rank 0 writes them."""

    unlike = "other ranks"

    @property
    def layout(self) -> dict[str, Any]:
        return {"zero_world_size": self.run.runtime.world_size}

    @property
    def rng_file(self) -> str:
        return rng_file(self.run)

    def adapter_part(self, *, with_optimizer: bool) -> AdapterPart:
        run = self.run
        by_file = {WEIGHTS_FILE: whole_adapters(run)}
        if with_optimizer:
            by_file |= _whole_optimizer(run)
        kinds = [Path(name).stem for name in by_file if name != WEIGHTS_FILE]
        part = _part(by_file) if run.runtime.rank == 0 else RankPart(files={})
        config = encode_config(self.lora, str(self.base) if self.base else None)
        return AdapterPart(part, kinds, lambda folder: write_file(folder / CONFIG_FILE, config))

    def optimizer_facts(self) -> dict[str, Any]:
        return {
            "optimizer_updates": num_updates(self.run),
            "loss_scaler": scaler_state(self.run.optimizer.loss_scaler),
        }

    def load_optimizer(self, saved: SavedLora) -> None:
        states = {
            kind: read_adapter_tensors(
                saved.folder / f"{kind}.safetensors", self.identity.config, self.lora
            )
            for kind in saved.state["optimizer"]
        }
        updates = int(saved.state["optimizer_updates"])
        load_state(self.run, adapter_parameters(self.run.model), states, updates)
        load_scaler_state(self.run.optimizer.loss_scaler, saved.state["loss_scaler"])


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
