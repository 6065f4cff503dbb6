"""FinetuneSettings: every flag of `launch/finetune_qwen2.py`, and the rules between them.

Pretraining's flags are all here, but its data's. Names are MindSpeed-LLM's where it has the flag.
Nothing here imports torch, so `--help` answers at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from qwen2_ascend.config import Qwen2Config
from qwen2_ascend.data.chat.settings import ChatDataSettings, ChatSettings
from qwen2_ascend.errors import Faults, raise_if
from qwen2_ascend.flags import Flag, given_flags, number_faults
from qwen2_ascend.lora_config import LoraConfig
from qwen2_ascend.parallel import sequence_unit
from qwen2_ascend.training.length import RunLength
from qwen2_ascend.training.megatron_flags import parse_training_flags
from qwen2_ascend.training.settings import TrainingSettings, shared_faults

F = TypeVar("F", bound="FinetuneSettings")

LORA_FIELDS = {
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target_modules": "targets",
    "use_rslora": "use_rslora",
}
"""LoraConfig's field for each flag."""
RESETS = ("--reset-attention-mask", "--reset-position-ids")
"""Flags of Megatron-LM's and MindSpeed-LLM's that part what is in one sample."""


@dataclass(frozen=True, kw_only=True)
class TuningSettings:
    """What is learnt from the data, and how long."""

    stage: Literal["sft", "dpo"] = "sft"
    """sft: what the assistant says in chats. dpo: to prefer the chosen of two answers (Rafailov et
    al. 2023, arXiv:2305.18290)."""
    num_train_epochs: float | None = None
    """Passes over the data, instead of --train-iters or --train-samples."""
    tokenizer_name_or_path: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Tokenizer for files of chats; by default the one beside the weights. Where --load has no
    config.json this folder's is taken."""
    dpo_beta: float = 0.1
    """How strongly dpo holds the model to where it started."""
    dpo_loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """The loss of a pair's margin."""
    dpo_label_smoothing: float = 0.0
    """The share of pairs whose preference sigmoid takes for wrong (cDPO)."""
    pref_ftx: float = 0.0
    """Weight of the chosen answer's own sft loss, added to dpo's."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) instead of all weights."""

    lora_r: Annotated[int | None, tyro.conf.arg(aliases=["--lora-rank"])] = None
    """Rank of the adapters; tunes them alone. Without it all weights are tuned."""
    lora_alpha: float | None = None
    """The adapters' output is multiplied by alpha / rank; 32 for a new run that does not say it."""
    lora_dropout: float | None = None
    """Share of the adapters' inputs to drop; a new run drops none where it is not said."""
    lora_target_modules: tuple[str, ...] | None = None
    """Megatron's names (linear_qkv, linear_proj, linear_fc1, linear_fc2), Hugging Face's (q_proj,
    gate_proj ...), or all-linear, which a new run takes that says nothing."""
    use_rslora: Flag = False
    """Multiply by alpha / sqrt(rank) instead."""
    lora_load: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Start from this PEFT adapter; it says rank, alpha and targets."""

    @property
    def is_on(self) -> bool:
        """Whether adapters are tuned, not the weights."""
        return self.lora_r is not None or self.lora_load is not None

    def said(self) -> dict[str, Any]:
        """What is said of adapters, by the names of LoraConfig's fields."""
        values = {field: getattr(self, flag) for flag, field in LORA_FIELDS.items()}
        return {
            name: value
            for name, value in values.items()
            if value is not None and value is not False
        }

    @classmethod
    def of(cls, lora: LoraConfig) -> LoraSettings:
        """The flags that ask for these adapters."""
        return cls(
            lora_r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            lora_target_modules=lora.targets,
            use_rslora=lora.use_rslora,
        )


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What is written besides the last checkpoint, once, when the run is complete."""

    save_hf: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Write the tuned model there as a Hugging Face folder, adapters merged into it."""
    save_adapter: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Write the adapters there as a PEFT folder."""


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(TrainingSettings):
    """Fine-tune Qwen2 / Qwen2.5 on chats: all weights or LoRA, SFT or DPO, one process per device.

    torchrun --nproc-per-node 4 launch/finetune_qwen2.py --load Qwen2.5-0.5B --data-path chats.jsonl
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --seq-length 1024 --pack
    --global-batch-size 16 --num-train-epochs 3 --lr 1e-5 --bf16 --save out --save-hf tuned
    """

    tuning: TuningSettings = field(default_factory=TuningSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    data: ChatDataSettings = field(default_factory=ChatDataSettings)
    chat: ChatSettings = field(default_factory=ChatSettings)
    export: ExportSettings = field(default_factory=ExportSettings)

    def with_epochs(
        self: F,
        samples_per_epoch: int,
        world_size: int,
        *,
        iteration: int = 0,
        consumed_samples: int = 0,
    ) -> F:
        """The same with --num-train-epochs told in steps; part of a last step is a step.

        `samples_per_epoch` is what one pass over the data takes, the rest is `length`'s.
        """
        epochs = self.tuning.num_train_epochs
        if epochs is None:
            return self
        left = max(round(epochs * samples_per_epoch), 1) - consumed_samples
        steps = iteration + max(-(-left // self.global_batch_size(world_size)), 0)
        return replace(self, batch=replace(self.batch, train_iters=steps))

    @property
    def tokenizer_folder(self) -> str | None:
        return self.tuning.tokenizer_name_or_path

    @property
    def keeps_apart(self) -> bool:
        """Whether flags say that a chat sees only itself, in packs that were prepared too."""
        given = {flag for flag, _ in self.pasted}
        return self.data.pack or not given.isdisjoint(RESETS)

    @property
    def variable_seq_lengths(self) -> bool:
        return self.data.variable_seq_lengths

    @property
    def lora_rank(self) -> int | None:
        return self.lora.lora_r

    @property
    def trains_pairs(self) -> bool:
        return self.tuning.stage == "dpo"

    @property
    def data_notes(self) -> list[str]:
        shares = self.data.split.split(",")[1:2]
        is_kept = bool(self.data.data_path) and any(share.strip(" 0.") for share in shares)
        if self.data.eval_iters is not None or not is_kept:
            return []
        return [
            f"--split {self.data.split}: the share for validation is not trained on, and without "
            "--eval-iters its loss is not measured"
        ]

    @property
    def unplanned(self) -> list[str]:
        return ["--lora-load"] if self.lora.lora_load is not None else []

    @property
    def pad_to_multiple_of(self) -> int:
        """What the length of a batch of --variable-seq-lengths is a multiple of, in tokens.

        Context and sequence parallelism cut a batch into parts.
        """
        is_shared = self.parallel.sequence_parallel
        unit = sequence_unit(self.layout(), sequence_parallel=is_shared)
        return math.lcm(self.data.pad_to_multiple_of, unit)

    def lora_config(self) -> LoraConfig | None:
        """The adapters that --lora-r and its companions ask for; None without them.

        Raises:
            UserError: values that no adapter can have.
        """
        return None if self.lora.lora_r is None else LoraConfig(**self.lora.said())


def parse(arguments: Sequence[str] | None = None) -> FinetuneSettings:
    """The command line; on a fault it prints and exits with 2, printing on rank 0 only."""
    return parse_training_flags(FinetuneSettings, "finetune_qwen2.py", arguments)


def validate(
    settings: FinetuneSettings, config: Qwen2Config, world_size: int, made: RunLength | None = None
) -> None:
    """Checks everything that can be checked before any process group exists.

    The arguments are those of `training.settings.validate`.

    Raises:
        UserError: all faults at once.
    """
    faults = shared_faults(settings, config, world_size, made)
    faults += _length_faults(settings) + _tuning_faults(settings) + _adapter_faults(settings)
    faults += _data_faults(settings)
    raise_if(dict.fromkeys(faults))


def _length_faults(settings: FinetuneSettings) -> list[str]:
    batch, epochs = settings.batch, settings.tuning.num_train_epochs
    given = (batch.train_iters, batch.train_samples, epochs)
    if sum(value is not None for value in given) != 1:
        return ["give one of --train-iters, --train-samples and --num-train-epochs."]
    return number_faults(settings.tuning, above_zero=("num_train_epochs",))


def _tuning_faults(settings: FinetuneSettings) -> list[str]:
    tuning = settings.tuning
    faults = number_faults(tuning, above_zero=("dpo_beta",), not_negative=("pref_ftx",))
    if not 0 <= tuning.dpo_label_smoothing < 0.5:
        faults.append(
            f"--dpo-label-smoothing {tuning.dpo_label_smoothing} must be from 0 to below 0.5."
        )
    if tuning.dpo_label_smoothing and tuning.dpo_loss_type != "sigmoid":
        faults.append("--dpo-label-smoothing needs --dpo-loss-type sigmoid.")
    if tuning.stage != "dpo":
        names = ("dpo_beta", "dpo_loss_type", "dpo_label_smoothing", "pref_ftx")
        faults += [f"{flag} needs --stage dpo." for flag in given_flags(tuning, names)]
    return faults


def _adapter_faults(settings: FinetuneSettings) -> list[str]:
    lora, export, faults = settings.lora, settings.export, Faults()
    faults.collect(settings.lora_config)
    if lora.lora_r is not None and lora.lora_load is not None:
        faults.append("--lora-r and --lora-load: give one of them; an adapter has its rank.")
    if export.save_adapter and not lora.is_on:
        faults.append("--save-adapter needs --lora-r or --lora-load: there is no adapter.")
    if export.save_hf and settings.checkpoint.save is None:
        faults.append("--save-hf needs --save: the folder is made from the last checkpoint.")
    return faults


def _data_faults(settings: FinetuneSettings) -> list[str]:
    data, faults = settings.data, []
    if data.eval_iters and not data.valid_data_path and settings.data.split == "100,0,0":
        faults.append("--eval-iters needs --valid-data-path, or a share in --split, as in 98,2,0.")
    if data.pad_to_multiple_of > 1 and not data.variable_seq_lengths:
        faults.append(
            f"--pad-to-multiple-of {data.pad_to_multiple_of} needs --variable-seq-lengths: without "
            "it every sample is as long as --seq-length."
        )
    return faults + number_faults(data, at_least_one=("pad_to_multiple_of",))
