"""Opens the LoRA adapter that a folder holds, whatever wrote it, and holds flags about it to it.

Known are a PEFT folder, a LoRA run of this project (each of its iterations is a PEFT folder) and
a LoRA run of MindSpeed-LLM (Megatron shards with the adapter's matrices in them).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qwen2_ascend.checkpoint.adapter import Adapter
from qwen2_ascend.checkpoint.formats import megatron
from qwen2_ascend.checkpoint.formats.megatron_adapter import has_matrices, open_megatron_adapter
from qwen2_ascend.checkpoint.formats.peft_adapter import CONFIG_FILE, open_adapter
from qwen2_ascend.checkpoint.readers.ranks import layout_of
from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.errors import UserError, raise_if
from qwen2_ascend.lora_config import projections


@dataclass(frozen=True, kw_only=True)
class GivenLora:
    """What flags say of an adapter; it has to be so. None and () say nothing."""

    rank: int | None = None
    """--lora-r."""
    alpha: float | None = None
    """--lora-alpha; also what holds where the checkpoint itself does not say it."""
    targets: tuple[str, ...] = ()
    """--lora-target-modules, in Megatron's or Hugging Face's names."""

    @property
    def flags(self) -> tuple[str, ...]:
        """Those that are given."""
        given = {
            "--lora-r": self.rank,
            "--lora-alpha": self.alpha,
            "--lora-target-modules": self.targets or None,
        }
        return tuple(flag for flag, value in given.items() if value is not None)


def open_lora(folder: str | Path, config: Qwen2Config, given: GivenLora | None = None) -> Adapter:
    """Opens the adapter in `folder`; reads headers only.

    Args:
        folder: a PEFT folder, or what a LoRA run saved.
        config: the config of the model that was adapted.
        given: what flags say of it.

    Raises:
        UserError: there is none, it does not fit the model, or the flags contradict it.
    """
    folder, given = Path(folder), given or GivenLora()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder.")
    places = (folder, megatron.tracked_folder(folder))
    found = next((place for place in places if (place / CONFIG_FILE).is_file()), None)
    if found is not None:
        adapter = open_adapter(found, config)
    else:
        adapter = _open_shards(folder, config, given.alpha)
    raise_if(_contradictions(adapter, given))
    return adapter


def _open_shards(folder: Path, config: Qwen2Config, alpha: float | None) -> Adapter:
    if not megatron.is_checkpoint_folder(folder):
        raise UserError(
            f"{folder}: holds no LoRA adapter, neither {CONFIG_FILE} nor a LoRA run's checkpoint."
        )
    iteration = megatron.iteration_folder(folder)
    if megatron.is_torch_dist(iteration):
        raise UserError(
            f"{iteration}: a LoRA checkpoint in torch_dist is not read; save it with "
            "--ckpt-format torch there."
        )
    shards, args = megatron.read_ranks(iteration)
    if not has_matrices(shards):
        raise UserError(f"{iteration}: its shards hold no lora_A and lora_B.")
    layout = layout_of(iteration, shards, config)
    layout.check(config)
    return open_megatron_adapter(iteration, shards, layout, config, args, alpha)


def _contradictions(adapter: Adapter, given: GivenLora) -> Iterator[str]:
    lora = adapter.lora
    if given.rank is not None and given.rank != lora.rank:
        yield f"--lora-r {given.rank}: {adapter.folder} is of rank {lora.rank}."
    if given.alpha is not None and given.alpha != lora.alpha:
        yield f"--lora-alpha {given.alpha:g}: {adapter.folder} was trained with {lora.alpha:g}."
    if given.targets and projections(given.targets) != lora.targets:
        yield (
            f"--lora-target-modules {' '.join(given.targets)}: {adapter.folder} adapts "
            f"{', '.join(lora.targets)}."
        )
